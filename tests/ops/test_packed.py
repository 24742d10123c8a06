"""A packed row with an adapter for every token: each equation against one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from turnrow.ops import packed
from turnrow.ops.packed import Grouping, group

CPU = torch.device("cpu")
SLOTS, RANK, IN, OUT = 5, 3, 7, 6

segments = st.lists(
    st.tuples(st.integers(1, 40), st.one_of(st.none(), st.integers(0, SLOTS - 1))), min_size=1, max_size=8
)


def of_tokens(row: Sequence[tuple[int, int | None]]) -> list[int | None]:
    return [slot for length, slot in row for _ in range(length)]


def grouped(row: Sequence[tuple[int, int | None]]) -> Grouping | None:
    return group([length for length, _ in row], [slot for _, slot in row], CPU)


def row_of(row: Sequence[tuple[int, int | None]]) -> tuple[Tensor, Tensor]:
    tokens = len(of_tokens(row))
    return torch.randn(tokens, IN, dtype=torch.float64), torch.randn(tokens, OUT, dtype=torch.float64)


def flat(index: Tensor, grouping: Grouping, width: int) -> Tensor:
    tokens = torch.arange(len(grouping.slots)) if grouping.tokens is None else grouping.tokens
    return index[grouping.slots] + tokens[:, None] * width


@given(segments)
def test_a_grouping_holds_every_token_once_with_its_own_slot(row):
    slots, grouping = of_tokens(row), grouped(row)
    if grouping is None:
        assert set(slots) == {None}
        return
    tokens = list(range(len(slots))) if grouping.tokens is None else grouping.tokens.tolist()
    assert tokens == [token for token, slot in enumerate(slots) if slot is not None]
    assert grouping.slots.tolist() == [slots[token] for token in tokens]
    assert grouping.together == (len(set(grouping.slots.tolist())) == 1)
    assert grouping.tiles is None or grouping.runs is None
    if grouping.runs is not None:
        in_runs = [token for first, last in grouping.runs for token in range(first, last)]
        assert in_runs == tokens
        of_runs = [{slots[token] for token in range(first, last)} for first, last in grouping.runs]
        assert of_runs == [{slot} for slot in grouping.tile_slots.tolist()]
    if grouping.tiles is not None:
        assert grouping.places is not None
        assert grouping.tiles[grouping.places].tolist() == list(range(len(tokens)))
        of_places = grouping.tile_slots.repeat_interleave(grouping.length)[grouping.places]
        assert of_places.tolist() == grouping.slots.tolist()


@pytest.fixture(params=[1, 4, 10**6], ids=["runs", "as on a CPU", "tiles"])
def shortest(request, monkeypatch):
    """How long runs are at least."""
    monkeypatch.setitem(packed._SHORTEST_RUNS, "cpu", request.param)
    return request.param


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments)
def test_rows_columns_and_low_rank_equal_one_token_at_a_time(shortest, row):
    grouping = grouped(row)
    if grouping is None:
        return
    if shortest == 1 or shortest == 10**6:
        assert (grouping.runs is not None) == (shortest == 1 and not grouping.together)
    x, y = row_of(row)
    wide, tall = torch.randn(SLOTS, RANK, IN, dtype=torch.float64), torch.randn(SLOTS, RANK, OUT, dtype=torch.float64)
    rows, columns = (torch.stack([torch.randperm(n)[:RANK] for _ in range(SLOTS)]) for n in (OUT, IN))
    expected = {"rows": y.clone(), "columns": y.clone(), "lora": y.clone()}
    for token, slot in enumerate(of_tokens(row)):
        if slot is not None:
            expected["rows"][token, rows[slot]] += wide[slot] @ x[token]
            expected["columns"][token] += x[token, columns[slot]] @ tall[slot]
            expected["lora"][token] += (wide[slot] @ x[token]) @ tall[slot]
    a, b = packed.stack(wide, RANK, grouping), packed.stack(tall, RANK, grouping)
    found = {name: y.clone() for name in expected}
    packed.add_rows_(found["rows"], x, a, flat(rows, grouping, OUT), grouping)
    packed.add_columns_(found["columns"], x, b, flat(columns, grouping, IN), grouping)
    packed.add_low_rank_(found["lora"], x, a, b, grouping)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@given(segments)
def test_entries_equal_one_token_at_a_time(row):
    grouping = grouped(row)
    if grouping is None:
        return
    x, y = row_of(row)
    rows, columns = torch.randint(OUT, (SLOTS, 4)), torch.randint(IN, (SLOTS, 4))
    deltas = torch.randn(SLOTS, 4, dtype=torch.float64)
    expected = y.clone()
    for token, slot in enumerate(of_tokens(row)):
        if slot is not None:
            for delta, r, c in zip(deltas[slot], rows[slot], columns[slot], strict=True):
                expected[token, r] += delta * x[token, c]
    packed.add_entries_(y, x, deltas[grouping.slots], flat(rows, grouping, OUT), flat(columns, grouping, IN))
    torch.testing.assert_close(y, expected)


def test_a_token_without_slot_is_left_alone_bit_for_bit(shortest):
    row = [(3, None), (2, 1), (4, None), (1, 2)]
    grouping = grouped(row)
    assert grouping is not None
    x, y = row_of(row)
    before = y.clone()
    table = torch.randn(SLOTS, RANK, IN, dtype=torch.float64)
    up = torch.randn(SLOTS, RANK, OUT, dtype=torch.float64)
    packed.add_low_rank_(y, x, packed.stack(table, RANK, grouping), packed.stack(up, RANK, grouping), grouping)
    base = torch.tensor([slot is None for slot in of_tokens(row)])
    assert torch.equal(y[base], before[base])
    assert not torch.equal(y[~base], before[~base])


@pytest.mark.parametrize("row", [[(1, 0), (1, 1), (1, 2)], [(30, 0), (20, 1)], [(9, 1), (1, None), (3, 1)]])
def test_nan_in_one_token_stays_there(shortest, row):
    grouping = grouped(row)
    assert grouping is not None
    x, y = row_of(row)
    x[0] = float("nan")
    wide, tall = torch.randn(SLOTS, RANK, IN, dtype=torch.float64), torch.randn(SLOTS, RANK, OUT, dtype=torch.float64)
    packed.add_low_rank_(y, x, packed.stack(wide, RANK, grouping), packed.stack(tall, RANK, grouping), grouping)
    packed.add_rows_(
        y, x, packed.stack(wide, RANK, grouping), flat(torch.zeros(SLOTS, RANK).long(), grouping, OUT), grouping
    )
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize(
    ("row", "length"),
    [([(1, 0), (1, 1), (1, 2)], 1), ([(200, 0), (200, 1)], 256), ([(200, 0), (1, 1), (1, 2), (1, 3)], 16)],
)
def test_tiles_are_tokens_in_decoding_and_long_in_prompts(row, length, monkeypatch):
    monkeypatch.setitem(packed._SHORTEST_RUNS, "cpu", 10**6)
    grouping = grouped(row)
    assert grouping is not None
    assert grouping.length == length


def test_neighbours_of_one_slot_are_one_run_and_short_ones_are_none():
    grouping = grouped([(8, 1), (4, 1), (3, None), (6, 2), (0, 1), (6, 2), (5, 1)])
    assert grouping is not None
    assert grouping.runs == ((0, 12), (15, 27), (27, 32))
    assert grouping.tile_slots.tolist() == [1, 2, 1]
    for row in ([(1, 0), (1, 1), (1, 2)], [(4, 0), (3, 1)]):
        found = grouped(row)
        assert found is not None
        assert found.runs is None
