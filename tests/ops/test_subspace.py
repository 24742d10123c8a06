"""A part of what is numbered, as a user names it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.ops import pairs
from turnrow.ops.subspace import check_subspace, most_specific, subspace


def _numbers(part, size=10):
    return subspace(part, size, where="blocks", what="pairs").tolist()


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (":50%", [0, 1, 2, 3, 4]),
        ("50%:", [5, 6, 7, 8, 9]),
        ("25%:75%", [2, 3, 4, 5, 6]),
        ("0%:12.5%", [0]),
        ("::2", [0, 2, 4, 6, 8]),
        ("1::3", [1, 4, 7]),
        ("8:", [8, 9]),
        (" 2 : 4 ", [2, 3]),
        (":", list(range(10))),
        ("7:1000", [7, 8, 9]),
        ([3, 0], [0, 3]),
    ],
)
def test_numbers_of_a_part(part, expected):
    assert _numbers(part) == expected


@given(st.integers(1, 500), st.integers(1, 99))
def test_two_shares_of_any_size_leave_none_out_and_have_none_in_common(size, percent):
    found = [number for part in (f":{percent}%", f"{percent}%:") for number in _numbers_or_none(part, size)]
    assert found == list(range(size))


@given(st.integers(1, 500), st.integers(1, 9))
def test_slices_of_one_step_leave_none_out_and_have_none_in_common(size, step):
    found = [number for start in range(step) for number in _numbers_or_none(f"{start}::{step}", size)]
    assert sorted(found) == list(range(size))


def _numbers_or_none(part, size):
    try:
        return _numbers(part, size)
    except UserError as error:
        if "holds none" not in str(error):
            raise
        return []


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("first_half", "must be a slice such as"),
        ("-1:", "must be a slice"),
        ("::0", "step must be 1 or more"),
        ("::", None),
        ("50%:120%", "beyond 100%"),
        ("", "must be a slice"),
        ([], "must be a slice"),
        (0.5, "must be a slice"),
        ([1, 1], "names 1 more than once"),
        ([True], "contains True"),
        ([-1], "contains -1"),
        ([10], "contains 10, which is out of range: there are 10 pairs, numbered 0 to 9"),
        ("10:", "holds none of the 10 pairs"),
        ("5:5", "holds none"),
        ("1:2:3:4", "must be a slice"),
    ],
)
def test_what_names_no_part_is_refused(part, says):
    if says is None:
        check_subspace(part, "blocks")
        return
    with pytest.raises(UserError, match=says):
        _numbers(part)


def test_the_most_specific_name_wins():
    entries = {"key": "::2", "1.attention.key": "1::2"}
    assert most_specific(entries, "layer.1.attention.key") == "1::2"
    assert most_specific(entries, "layer.0.attention.key") == "::2"
    assert most_specific(entries, "layer.0.attention.query") is None


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group_size", [2, 4, 12])
def test_places_hold_all_that_belongs_to_a_block_and_nothing_else(variant, group_size):
    out = 12
    size = pairs.parameter_size(variant, out)
    for block in range(out // 2):
        places = pairs.places(variant, group_size, torch.tensor([block]))
        theta = torch.zeros(size).index_fill(0, places, 0.3)
        changed = [
            entry.flatten() != rest
            for entry, rest in zip(_blocks(variant, group_size, theta), (1, 0, 1, 0), strict=True)
        ]
        assert all(one.nonzero().flatten().tolist() == [block] for one in changed)


def _blocks(variant, group_size, theta):
    return pairs.coefficients(variant, group_size, theta, torch.ones_like(theta))
