"""Columns beside trained rows: what lies in both belongs to the rows."""

from __future__ import annotations

import torch

from turnrow.ops import columns


def test_others_are_the_rows_left_over_in_order():
    assert columns.others(torch.tensor([3, 0]), 6).tolist() == [1, 2, 4, 5]
    assert columns.others(torch.tensor([1, 0]), 2).tolist() == []
    assert columns.others(torch.empty(2, dtype=torch.int64, device="meta"), 6).shape == (4,)


def test_spread_is_zero_in_the_trained_rows_and_passes_gradcheck():
    delta = torch.arange(1.0, 5.0, dtype=torch.float64).view(2, 2).requires_grad_()
    rest = columns.others(torch.tensor([1]), 3)
    assert columns.spread(delta, rest, 3).tolist() == [[1, 2], [0, 0], [3, 4]]
    assert torch.autograd.gradcheck(lambda d: columns.spread(d, rest, 3), (delta,))
