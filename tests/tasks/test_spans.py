from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks.spans import best_spans, spans_of_windows


def slow_search(start: np.ndarray, end: np.ndarray, longest: int) -> list[tuple[float, int, int]]:
    spans = [
        (float(start[i] + end[j]), i, j) for i in range(len(start)) for j in range(i, min(i + longest, len(start)))
    ]
    return sorted(spans, key=lambda span: (-span[0], span[1], span[2]))


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=9), st.integers(1, 6), st.integers(1, 12))
def test_the_search_is_that_over_all_spans(scores: list[tuple[int, int]], longest: int, count: int) -> None:
    start, end = np.array(scores, dtype=float).reshape(-1, 2).T
    assert best_spans(start, end, longest, count) == slow_search(start, end, longest)[:count]


def test_a_span_ends_where_it_may_and_not_before_it_begins() -> None:
    start, end = np.array([0.0, 9.0, 0.0, 0.0]), np.array([9.0, 0.0, 0.0, 1.0])
    assert best_spans(start, end, 1, 1) == [(9.0, 0, 0)]
    assert best_spans(start, end, 4, 1) == [(10.0, 1, 3)]
    assert best_spans(np.full(2, -np.inf), np.zeros(2), 2, 4) == []


def window(row: int, starts: list[int], ends: list[int], text: str = "") -> dict[str, Any]:
    return {
        "row": row, "example": 0, "context_start": 2, "starts": starts, "ends": ends, "null_position": 0, "context": text,
    }  # fmt: skip


def scores(*windows: list[tuple[float, float]]) -> np.ndarray:
    """Of each window its tokens; filled up as Trainer does."""
    longest = max(map(len, windows))
    return np.array([[*tokens, *[(-100.0, -100.0)] * (longest - len(tokens))] for tokens in windows], dtype=float)


def test_windows_are_combined_by_their_greatest_span_and_their_least_no_answer() -> None:
    # "red house" in both windows, and better in the second; the first is sure that it has no answer.
    windows = [window(0, [0, 4], [3, 9], "red house man"), window(1, [0, 4, 10], [3, 9, 13])]
    found, null = spans_of_windows(
        windows,
        scores([(6, 6), (0, 0), (2, 0), (0, 3)], [(1, 0), (0, 0), (3, 0), (0, 4), (0, 0)]),
        longest=3,
        count=2,
    )
    assert [(span.start, span.end, span.score) for span in found] == [(0, 9, 7.0), (4, 9, 4.0)]
    assert null == 1.0
    again, _ = spans_of_windows(
        windows, scores([(6, 6), (0, 0), (5, 0), (0, 3)], [(1, 0), (0, 0), (1, 0), (0, 4), (0, 0)]), longest=3, count=1
    )
    assert [(span.start, span.end, span.score) for span in again] == [(0, 9, 8.0)]


def test_blanks_are_no_part_of_an_answer() -> None:
    """Tokens of bytes hold the blank before a word, and may be nothing but blanks."""
    text = "a  cat "
    given = scores([(0, 0), (0, 0), (1, 0), (9, 9), (5, 0), (0, 5)])
    found, _ = spans_of_windows([window(0, [0, 1, 2, 6], [1, 2, 6, 7], text)], given, longest=4, count=1)
    assert text[found[0].start : found[0].end] == "cat"
    assert found[0].score == 5.0


@pytest.mark.parametrize("place", [0, 3])
def test_scores_of_a_diverged_model_are_refused(place: int) -> None:
    given = scores([(0, 0)] * 4)
    given[0, place, 1] = np.nan
    with pytest.raises(UserError, match="prediction for question 1 is not finite: the model has diverged"):
        spans_of_windows([window(0, [0, 4], [3, 9], "red house")], given, longest=2, count=1)
