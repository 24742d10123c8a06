"""The list of changes, and who was heard of."""

from __future__ import annotations

import time

import pytest

from turnrow.serving.replicas import Board, Change, Report


def report(name: str, state: str = "running") -> Report:
    return Report(name, state, 0, 0, 3, 128, "")


def test_each_adapter_is_there_with_its_last_change_in_their_order() -> None:
    board = Board()
    assert board.number == 0
    board.record(Change("a", "/a"))
    first = board.number
    board.record(Change("b", "/b"))
    board.record(Change("a", None))
    assert [(change.name, change.folder) for change in board.since(0)] == [("b", "/b"), ("a", None)]
    assert [change.name for change in board.since(first)] == ["b", "a"]
    assert board.since(board.number) == []


def test_numbers_grow_also_from_one_board_to_the_next() -> None:
    former, new = Board(), Board()
    for name in "abc":
        former.record(Change(name, "/x"))
    new.record(Change("d", "/x"))
    assert new.number > former.number


def test_what_is_brought_back_does_not_undo_what_came_later() -> None:
    former, new = Board(), Board()
    former.record(Change("a", "/old"))
    former.record(Change("b", "/b"))
    new.record(Change("a", None))
    new.restore(former.since(0))
    assert {change.name: change.folder for change in new.since(0)} == {"a": None, "b": "/b"}


def test_who_is_silent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    board, now = Board(), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board.report(report("one"))
    now += 6
    board.report(report("two"))
    assert [r.replica for r in board.reports()] == ["one", "two"]
    now += 6
    assert [r.replica for r in board.reports()] == ["two"]
