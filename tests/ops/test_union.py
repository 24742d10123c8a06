"""Changes spread over their union, against the dense matrices written out; the values are whole numbers, so sums are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnrow.ops.union import Change, align, overlap

OUT, IN = 5, 4


def dense(change: Change) -> torch.Tensor:
    matrix = torch.zeros(OUT, IN, dtype=torch.float64)
    if change.entry is not None:
        matrix.view(-1)[change.entry[1]] = change.entry[0]
    if change.column is not None:
        rest = [i for i in range(OUT) if change.row is None or i not in change.row[1].tolist()]
        for place, j in enumerate(change.column[1].tolist()):
            matrix[rest, j] = change.column[0][:, place]
    if change.row is not None:
        matrix[change.row[1]] = change.row[0]
    return matrix


def support(change: Change) -> set[tuple[int, int]]:
    """What a change touches, by ones in the place of its values."""
    ones = {
        part: (torch.ones_like(held[0]), held[1])
        for part in ("row", "column", "entry")
        if (held := getattr(change, part)) is not None
    }
    return {tuple(place) for place in dense(Change(**ones)).nonzero().tolist()}


@st.composite
def changes(draw, kinds=("row", "column", "both", "entry", "none")):
    kind = draw(st.sampled_from(kinds))
    numbers = st.integers(-8, 8)

    def chosen(size):
        return torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True)))

    def values(*shape):
        count = torch.Size(shape).numel()
        drawn = draw(st.lists(numbers, min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.float64).view(shape)

    parts = {}
    if kind in ("row", "both"):
        index = chosen(OUT)
        parts["row"] = values(len(index), IN), index
    if kind in ("column", "both"):
        index = chosen(IN)
        beside = len(parts["row"][1]) if "row" in parts else 0
        parts["column"] = values(OUT - beside, len(index)), index
    if kind == "entry":
        index = chosen(OUT * IN).sort().values
        parts["entry"] = values(len(index)), index
    return Change(**parts, in_features=IN)


def total(*some: Change) -> Change:
    aligned = align(some, torch.float64)
    return Change(
        row=None if aligned.row_index is None else (sum(aligned.row), aligned.row_index),
        column=None if aligned.column_index is None else (sum(aligned.column), aligned.column_index),
        entry=None if aligned.entry_index is None else (sum(aligned.entry), aligned.entry_index),
        in_features=IN,
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(changes(), min_size=1, max_size=4))
def test_the_sum_is_the_sum_of_the_dense_changes(some):
    found = total(*some)
    assert torch.equal(dense(found), sum(dense(change) for change in some))
    assert support(found) == set().union(*(support(change) for change in some))


@settings(max_examples=100, deadline=None)
@given(changes(), changes(), changes())
def test_adding_is_associative_and_commutative(a, b, c):
    left, right, turned = total(total(a, b), c), total(a, total(b, c)), total(c, b, a)
    for other in (right, turned):
        for part in ("row", "column", "entry"):
            mine, others = getattr(left, part), getattr(other, part)
            assert (mine is None) == (others is None)
            assert mine is None or (torch.equal(mine[0], others[0]) and torch.equal(mine[1], others[1]))


@settings(max_examples=100, deadline=None)
@given(st.lists(changes(), min_size=2, max_size=3))
def test_overlap_is_what_two_supports_share(some):
    found = overlap(some)
    supports = [support(change) for change in some]
    shared = {place for i, mine in enumerate(supports) for others in supports[i + 1 :] for place in mine & others}
    assert bool(found) == bool(shared)
    if any(change.entry is not None for change in some):
        assert found.entries == len(shared)
    else:
        in_rows = {(i, j) for i in found.row for j in range(IN)}
        in_columns = {(i, j) for i in range(OUT) for j in found.column}
        assert found.crossings == len(shared - in_rows - in_columns)


def test_rows_and_columns_by_eye():
    rows = Change(row=(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([2])))
    both = Change(
        row=(torch.full((1, 4), 10.0), torch.tensor([0])),
        column=(torch.tensor([[100.0], [200.0], [300.0], [400.0]]), torch.tensor([3])),
    )
    aligned = align([rows, both], torch.float64)
    assert aligned.row_index.tolist() == [0, 2]
    assert aligned.column_index.tolist() == [3]
    assert aligned.row[0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert aligned.row[1].tolist() == [[10, 10, 10, 10], [0, 0, 0, 200]]  # row 2 takes along what its column had there
    assert aligned.column[0].tolist() == [[0], [0], [0]]
    assert aligned.column[1].tolist() == [[100], [300], [400]]
    assert overlap([rows, both]).crossings == 1


def test_entries_beside_columns_need_the_size():
    entries = Change(entry=(torch.ones(1), torch.tensor([3])))
    column = Change(column=(torch.ones(OUT, 1), torch.tensor([1])))
    with pytest.raises(ValueError, match="how many columns the weight has is not known"):
        align([entries, column], torch.float64)
