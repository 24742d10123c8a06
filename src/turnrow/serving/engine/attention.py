"""Attention over a packed row of requests, each over its own keys alone.

transformers' own attention for packed rows without flash kernels is one product of all queries with the keys of all requests, under
a mask. That costs (all queries) x (all keys), asks for a mask of gigabytes, and lets a NaN among the keys of one request reach
every other, since what a mask adds to NaN is NaN. Here the requests that decode are attended to together, filled up to equal
length, and a prompt by itself. It is registered with transformers' public `AttentionInterface` under the name `ATTENTION`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["ATTENTION", "AttentionPlan", "register"]

ATTENTION = "turnrow_packed"
"""Its name among transformers' implementations of attention."""


def register() -> None:
    """Make the implementation known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Where in the row the queries of each request lie, and where in the keys its own; handed to the model as `packed`."""

    queries: list[int]
    """Cumulative, beginning with 0."""
    keys: list[list[int]]
    """The same of the keys, for every kind of layer: with a sliding window there are fewer."""
    device: torch.device

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> AttentionPlan:
        """From what continuous batching hands to the model."""
        keys = inputs["cu_seq_lens_k"]
        kinds = list(keys.values()) if isinstance(keys, dict) else [keys]
        queries = inputs["cu_seq_lens_q"]
        return cls(queries.tolist(), [kind.tolist() for kind in kinds], queries.device)

    def of_layer(self, keys: int) -> _LayerPlan:
        """The plan for a layer that has so many keys in all; where two kinds of layers have as many, their plans are equal."""
        return next(plan for plan in self._layers if plan.keys[-1] == keys)

    @cached_property
    def _layers(self) -> list[_LayerPlan]:
        return [_LayerPlan(self.queries, keys, self.device) for keys in self.keys]


@dataclass(frozen=True, eq=False)
class _Decoding:
    """Requests with one query each and keys of similar length."""

    at: Tensor
    """(B,) int64, their places in the row."""
    keys: Tensor
    """(B, K) int64, the places of their keys, filled up by repeating the first."""
    mask: Tensor | None
    """(B, 1, 1, K) bool, which of them count; None if all do."""


class _LayerPlan:
    def __init__(self, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> None:
        self.keys = keys
        each = [
            (first, last - first, k_first, k_last - k_first)
            for first, last, k_first, k_last in zip(queries, queries[1:], keys, keys[1:], strict=False)
        ]
        single = sorted((one for one in each if one[1] == 1), key=lambda one: one[3], reverse=True)
        self.prompts = [one for one in each if one[1] > 1]
        self.decoding: list[_Decoding] = []
        while single:
            # lengths within a factor of two, so that at most half of the work is for filling up
            together = [one for one in single if 2 * one[3] >= single[0][3]]
            single = single[len(together) :]
            self.decoding.append(_decoding(together, device))


def _decoding(requests: Sequence[tuple[int, int, int, int]], device: torch.device) -> _Decoding:
    at, _, starts, lengths = torch.tensor(requests).unbind(1)
    longest = int(lengths.max())
    step = torch.arange(longest)
    counts = step < lengths.unsqueeze(1)  # (B, K)
    keys = starts.unsqueeze(1) + step * counts
    mask = None if bool(counts.all()) else counts[:, None, None].to(device)
    return _Decoding(at.to(device), keys.to(device), mask)


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        query: (1, heads, tokens, d); key and value: (1, key heads, tokens, d).
    """
    if packed is None:
        raise RuntimeError("this model is being served: generate with another copy of it, or stop the engine first")
    keys, values = _with_cache(module.layer_idx, key, value, kwargs)  # (key heads, all keys, d)
    plan = packed.of_layer(keys.shape[1])
    heads, tokens, size = query.shape[1:]
    out = query.new_empty(tokens, heads, values.shape[-1])
    for group in plan.decoding:
        # the queries of the heads that share a key head are attended to as if they were several queries
        own = query[0].index_select(1, group.at).transpose(0, 1).reshape(len(group.at), len(keys), -1, size)
        k, v = (t.transpose(0, 1)[group.keys].transpose(1, 2) for t in (keys, values))  # (B, key heads, K, d)
        result = scaled_dot_product_attention(own, k, v, attn_mask=group.mask, scale=scaling)
        out[group.at] = result.reshape(len(group.at), heads, -1)
    for first, length, k_first, k_length in plan.prompts:
        q = query[:, :, first : first + length]
        k, v = (t[None, :, k_first : k_first + k_length] for t in (keys, values))
        mask = _mask(length, k_length, sliding_window, query.device)
        result = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != len(keys)
        )
        out[first : first + length] = result[0].transpose(0, 1)
    return out.unsqueeze(0), None


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """(queries, keys) bool, which keys a query sees: the last query all up to the last key. None for the plain triangle."""
    if queries == keys and (window is None or keys <= window):
        return None
    key, last = torch.arange(keys, device=device), torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    seen = key <= last
    return seen if window is None else seen & (key > last - window)


def _with_cache(layer: int, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Write the new keys and values into the cache; all that the requests have, (key heads, all keys, d)."""
    update = kwargs["cache"].update
    if "read_index" in inspect.signature(update).parameters:  # of older transformers
        held = update(key, value, layer, kwargs["read_index"], kwargs["write_index"])  # (all keys, key heads, d)
        return held[0].transpose(0, 1), held[1].transpose(0, 1)
    keys, values = update(key, value, layer, dict(kwargs))
    return keys[0], values[0]
