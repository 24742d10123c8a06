from __future__ import annotations

import pytest
import torch

from turnrow.errors import UserError
from turnrow.selection import check_indices, first


def test_first_takes_the_first_r():
    assert first(10, 3).tolist() == [0, 1, 2]


def test_order_is_kept():
    assert torch.equal(check_indices([5, 0, 3], 6, what="row", module="m"), torch.tensor([5, 0, 3]))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "module 'm' are empty"),
        ([0, 6], "contain 6, which is out of range: it has 6 rows, numbered 0 to 5"),
        ([-1], "contain -1, which is out of range"),
        ([1, 2, 1], "name row 1 more than once"),
        ([1.0], "contain 1.0; row numbers are integers"),
        ([True], "contain True; row numbers are integers"),
        (["0"], "contain '0'; row numbers are integers"),
    ],
)
def test_bad_indices_are_named(indices, message):
    with pytest.raises(UserError, match=message):
        check_indices(indices, 6, what="row", module="m")
