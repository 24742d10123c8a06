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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["ATTENTION", "AttentionPlan", "register"]

ATTENTION = "turnrow_packed"
"""Its name among transformers' implementations of attention."""

_FULL = "full_attention"
"""What transformers calls layers without a window."""


def register() -> None:
    """Make the implementation known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)


class AttentionPlan:
    """Where in the row the queries of each request lie, and where its keys; made once a step, handed to the model as `packed`.

    Where all layers attend to everything, the cache is asked for the keys in the very order in which they are attended to, filled
    up where requests are, so that no layer has to copy them once more.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        """From what continuous batching hands to the model."""
        kinds: Any = inputs["cu_seq_lens_k"]  # by kind of layer; older transformers give a single kind as it is
        if not isinstance(kinds, dict):
            kinds = {_FULL: kinds}
        queries = inputs["cu_seq_lens_q"]
        self._layers = [_LayerPlan(queries.tolist(), kind.tolist(), queries.device) for kind in kinds.values()]
        # without a past nothing is read, and with a window the places of new keys in the index have a meaning of their own
        self.read_index: list[Tensor] | None = None
        if list(kinds) == [_FULL] and len(inputs["read_index"]) == 1 and inputs["read_index"][0].numel():
            self.read_index = [inputs["read_index"][0][self._layers[0].order]]
        self.in_order = self.read_index is not None
        """Whether the keys come in the order in which they are attended to."""

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The model's inputs for this plan."""
        changed = {} if self.read_index is None else {"read_index": self.read_index}
        return {**inputs, **changed, "packed": self}

    def of_layer(self, keys: int) -> _LayerPlan:
        """The plan for a layer that has so many keys in all; where two kinds of layers have as many, their plans are equal."""
        if self.in_order:
            return self._layers[0]
        return next(plan for plan in self._layers if plan.keys == keys)


@dataclass(frozen=True, eq=False)
class _Decoding:
    """Requests with one query each and keys of similar length."""

    at: Tensor
    """(B,) int64, their places in the row."""
    keys: Tensor
    """(B, K) int64, the places of their keys, filled up by repeating the first."""
    start: int
    """Where these B K keys begin, where they come in order."""
    mask: Tensor | None
    """(B, 1, 1, K) bool, which of them count; None if all do."""

    def of(self, tensor: Tensor, in_order: bool) -> Tensor:
        """(B, key heads, K, d) of keys or values (key heads, all keys, d)."""
        if in_order:
            own = tensor[:, self.start : self.start + self.keys.numel()].unflatten(1, self.keys.shape)
            return own.transpose(0, 1)
        return tensor.transpose(0, 1)[self.keys].transpose(1, 2)


class _Prompt(NamedTuple):
    """A request with several queries."""

    first: int
    length: int
    """Its queries in the row."""
    keys: int
    """Where its keys begin."""
    start: int
    """The same where they come in order."""
    key_length: int


class _LayerPlan:
    def __init__(self, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> None:
        self.keys = keys[-1]
        """Of all requests."""
        each = [
            (first, last - first, k_first, k_last - k_first)
            for first, last, k_first, k_last in zip(queries, queries[1:], keys, keys[1:], strict=False)
        ]
        self.decoding: list[_Decoding] = []
        self.prompts: list[_Prompt] = []
        order, start = [], 0
        single = sorted((one for one in each if one[1] == 1), key=lambda one: one[3], reverse=True)
        while single:
            # lengths within a factor of two, so that at most half of the work is for filling up
            together = [one for one in single if 2 * one[3] >= single[0][3]]
            single = single[len(together) :]
            group = _decoding(together, start, device)
            self.decoding.append(group)
            order.append(group.keys.flatten())
            start += group.keys.numel()
        for first, length, k_first, k_length in each:
            if length > 1:
                self.prompts.append(_Prompt(first, length, k_first, start, k_length))
                order.append(torch.arange(k_first, k_first + k_length, device=device))
                start += k_length
        self.order = torch.cat(order)
        """Places of the keys, in the order in which they are attended to."""


def _decoding(requests: Sequence[tuple[int, int, int, int]], start: int, device: torch.device) -> _Decoding:
    at, _, starts, lengths = torch.tensor(requests).unbind(1)
    counts = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # (B, K)
    keys = starts.unsqueeze(1) + torch.arange(counts.shape[1]) * counts
    mask = None if bool(counts.all()) else counts[:, None, None].to(device)
    return _Decoding(at.to(device), keys.to(device), start, mask)


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
        k, v = group.of(keys, packed.in_order), group.of(values, packed.in_order)
        result = scaled_dot_product_attention(own, k, v, attn_mask=group.mask, scale=scaling)
        out[group.at] = result.reshape(len(group.at), heads, -1)
    for prompt in plan.prompts:
        q = query[:, :, prompt.first : prompt.first + prompt.length]
        start = prompt.start if packed.in_order else prompt.keys
        k, v = (t[None, :, start : start + prompt.key_length] for t in (keys, values))
        mask = _mask(prompt.length, prompt.key_length, sliding_window, query.device)
        result = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != len(keys)
        )
        out[prompt.first : prompt.first + prompt.length] = result[0].transpose(0, 1)
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
