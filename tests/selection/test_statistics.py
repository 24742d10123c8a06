from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measure import LiveBytes
from turnrow.selection import GradientSums, InputNorms, real_tokens, weight_gradient

WEIGHT = torch.tensor([[1.0, -2.0, 0.0], [0.0, 1.0, -1.0]])
PARTS = ("row", "column", "entry")


def test_wanda_scores_are_weight_times_norm_of_the_inputs():
    norms = InputNorms()
    norms.add(torch.tensor([[3.0, 0.0, 1.0], [-4.0, 2.0, 0.0]]))
    norms.add(torch.tensor([[0.0, 0.0, -1.0]]))
    # norms of the three features: 5, 2, sqrt 2
    root = 2**0.5
    torch.testing.assert_close(norms.scores("row", WEIGHT), torch.tensor([5 + 4, 2 + root]))
    torch.testing.assert_close(norms.scores("column", WEIGHT), torch.tensor([5, 6, root]))
    torch.testing.assert_close(norms.scores("entry", WEIGHT), torch.tensor([5.0, 4, 0, 0, 2, root]))
    assert norms.count == 3


@pytest.mark.parametrize(("squared", "row"), [(False, [4.0, 6.0]), (True, [6.0, 26.0])])
def test_gradient_sums_are_of_magnitudes_batch_by_batch(squared, row):
    sums = GradientSums(PARTS, squared=squared)
    for gradient in ([[1.0, -1.0], [0.0, 5.0]], [[-2.0, 0.0], [1.0, 0.0]]):
        sums.add(torch.tensor(gradient))
    assert sums.scores("row").tolist() == row
    entries = torch.tensor([5.0, 1, 1, 25]) if squared else torch.tensor([3.0, 1, 1, 5])
    assert torch.equal(sums.scores("entry"), entries)
    assert sums.scores("column").tolist() == entries.view(2, 2).sum(0).tolist()
    assert sums.count == 2


def test_the_gradient_is_the_weights_own():
    weight = WEIGHT.clone().requires_grad_()
    x = torch.randn(4, 5, 3)
    dy = torch.randn(4, 5, 2)
    (x @ weight.t()).backward(dy)
    torch.testing.assert_close(weight_gradient(x, dy), weight.grad)


@given(cut=st.integers(0, 8))
def test_the_norm_does_not_depend_on_how_the_data_were_cut(cut):
    x = torch.randn(8, 3, dtype=torch.float64)
    whole, parts = InputNorms(), InputNorms()
    whole.add(x)
    parts.add(x[:cut])
    parts.add(x[cut:])
    weight = WEIGHT.double()
    torch.testing.assert_close(parts.scores("row", weight), whole.scores("row", weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_or_more(dtype):
    x = torch.full((4096, 3), 30.0, dtype=dtype)  # the square of the norm, 3.7e6, is infinite in float16
    norms = InputNorms()
    norms.add(x)
    assert norms.scores("column", torch.ones(1, 3, dtype=dtype)).tolist() == [30 * 64] * 3
    gradient = weight_gradient(x, torch.full((4096, 2), 30.0, dtype=dtype))
    assert (gradient.dtype, gradient[0, 0].item()) == (torch.float32, 4096 * 900)


def test_padding_does_not_count():
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    kept = [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert real_tokens(x, [mask]).tolist() == kept
    assert real_tokens(x, [mask.bool()]).tolist() == kept
    assert real_tokens(x.view(6, 2), [mask]).tolist() == kept
    assert real_tokens(x, [torch.ones(2, 5), mask]).tolist() == kept


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4), torch.ones(5, 4), torch.ones(2, 7, 4)], ids=["pooled", "routed", "patches"]
)
def test_where_no_mask_fits_all_tokens_count(x):
    assert real_tokens(x, [torch.zeros(2, 3)]).shape == (x.numel() // 4, 4)
    assert real_tokens(x, []).shape == (x.numel() // 4, 4)


@pytest.mark.parametrize("parts", [("row",), ("row", "column"), ("entry",)])
def test_accumulators_do_not_grow(parts):
    norms, sums = InputNorms(), GradientSums(parts, squared=False)

    def held(batches: int) -> int:
        with LiveBytes() as live:
            for _ in range(batches):
                x = torch.randn(7, 5)
                norms.add(x)
                sums.add(weight_gradient(x, torch.randn(7, 6)))
            del x
        return live.now

    assert held(1) > 0
    assert held(20) == 0
