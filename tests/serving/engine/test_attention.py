"""Attention over a packed row of requests."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from turnrow.serving.engine.attention import AttentionPlan, _mask, _packed_attention

HEADS, KEY_HEADS, SIZE = 4, 2, 8


class Cache:
    """Holds the keys of every request where transformers' cache would; both of the forms of `update` that are in use."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key, value, layer, kwargs):
        """As in transformers 5.23: (1, key heads, tokens, d) of the places that are asked for."""
        (places,) = kwargs["read_index"]
        return tuple(t[places].transpose(0, 1)[None] for t in (self.keys, self.values))


class OldCache(Cache):
    def update(self, key, value, layer, read_index, write_index):
        """As in transformers 5.6: (tokens, key heads, d)."""
        return self.keys[read_index[0]], self.values[read_index[0]]


class Layer:
    layer_idx = 0


@pytest.mark.parametrize("cache_class", [Cache, OldCache])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize(
    ("queries", "lengths"),
    [([1, 1, 1], [9, 9, 9]), ([1, 1, 1, 1], [3, 20, 8, 17]), ([4, 1, 6, 1], [4, 30, 11, 2]), ([5], [12])],
)
def test_each_request_attends_to_its_own_keys_alone(cache_class, kind, queries, lengths):
    torch.manual_seed(1)
    held = torch.randperm(200)[: sum(lengths)]  # pages of the cache lie anywhere
    cache = cache_class(torch.randn(200, KEY_HEADS, SIZE), torch.randn(200, KEY_HEADS, SIZE))
    query = torch.randn(1, HEADS, sum(queries), SIZE)
    inputs = {
        "cu_seq_lens_q": torch.tensor([0, *queries]).cumsum(0),
        "cu_seq_lens_k": {kind: torch.tensor([0, *lengths]).cumsum(0)},
        "read_index": [held],
        "write_index": [torch.empty(0, dtype=torch.int64)],
        "cache": cache,
    }
    plan = AttentionPlan(inputs)
    assert plan.in_order == (kind == "full_attention")
    new = torch.zeros(1, KEY_HEADS, sum(queries), SIZE)  # the cache has them already
    found, _ = _packed_attention(Layer(), query, new, new, None, **plan.inputs(inputs))
    q_start = k_start = 0
    for q, k in zip(queries, lengths, strict=True):
        own = held[k_start : k_start + k]
        key, value = (t[own].transpose(0, 1)[None].repeat_interleave(2, dim=1) for t in (cache.keys, cache.values))
        mask = torch.ones(q, k, dtype=torch.bool).tril(k - q)
        expected = scaled_dot_product_attention(query[:, :, q_start : q_start + q], key, value, attn_mask=mask)
        torch.testing.assert_close(found[:, q_start : q_start + q], expected.transpose(1, 2))
        q_start, k_start = q_start + q, k_start + k


def test_requests_of_similar_length_are_attended_to_together():
    inputs = {
        "cu_seq_lens_q": torch.tensor([0, 1, 2, 7, 8]),
        "cu_seq_lens_k": torch.tensor([0, 10, 16, 40, 43]),
    }
    plan = AttentionPlan({**inputs, "read_index": []}).of_layer(43)
    assert plan.prompts == [(2, 5, 16, 23, 24)]
    first, last = plan.decoding
    assert first.at.tolist() == [0, 1]
    assert first.keys[1].tolist() == [10, 11, 12, 13, 14, 15, 10, 10, 10, 10]
    assert first.mask is not None
    assert first.mask[1, 0, 0].tolist() == [True] * 6 + [False] * 4
    assert (last.at.tolist(), last.mask, last.start) == ([7], None, 20)
    assert plan.order.tolist() == [*range(10), *first.keys[1].tolist(), 40, 41, 42, *range(16, 40)]


def test_a_mask_lets_the_last_query_see_all_keys_and_a_window_its_own():
    assert _mask(3, 3, None, torch.device("cpu")) is None
    seen = _mask(2, 5, None, torch.device("cpu"))
    assert seen is not None
    assert seen.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    window = _mask(2, 5, 2, torch.device("cpu"))
    assert window is not None
    assert window.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
