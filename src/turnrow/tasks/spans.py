"""From the scores of tokens to the span of a context that answers a question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from turnrow.errors import UserError

__all__ = ["Span", "best_spans", "spans_of_windows"]


class Span(NamedTuple):
    """A piece of a context."""

    start: int
    """Its first character."""
    end: int
    """The one after its last."""
    score: float


def spans_of_windows(
    windows: Sequence[Mapping[str, Any]], predictions: np.ndarray, longest: int, count: int
) -> tuple[list[Span], float]:
    """The best spans of a context that was read in windows, and the score of 'no answer'.

    A span in several windows has its greatest score. There is no answer only if no window has one: that score is the least of the
    windows'.

    Args:
        windows: each with its ``row`` in `predictions`, ``context_start``, ``starts``, ``ends`` and ``null_position`` as the task encodes
            them; the first with the ``context``.
        predictions: of shape (rows, tokens, 2): the score of each token as first and as last one.
        longest: tokens in a span.
        count: how many to return at most.

    Raises:
        UserError: a score is not finite.
    """
    text = windows[0]["context"]
    null = math.inf
    found: dict[tuple[int, int], float] = {}
    for window in windows:
        scores = np.asarray(predictions[window["row"]], dtype=np.float64)
        starts, ends = window["starts"], window["ends"]
        read = scores[window["context_start"] :][: len(starts)]
        nothing = float(scores[window["null_position"]].sum())
        if not (np.isfinite(read).all() and math.isfinite(nothing)):
            raise UserError(
                f"the prediction for question {window['example'] + 1} is not finite: the model has diverged; train it with a "
                "lower learning rate"
            )
        null = min(null, nothing)
        # No span begins or ends with a token of nothing but blanks.
        blank = np.array([not text[start:end].strip() for start, end in zip(starts, ends, strict=True)], dtype=bool)
        read = np.where(blank[:, None], -np.inf, read)
        for score, first, last in best_spans(read[:, 0], read[:, 1], longest, count):
            place = _without_blanks(text, starts[first], ends[last])
            found[place] = max(score, found.get(place, -math.inf))
    ranked = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [Span(*place, score) for place, score in ranked], null


def best_spans(start: np.ndarray, end: np.ndarray, longest: int, count: int) -> list[tuple[float, int, int]]:
    """Return the `count` spans i..j, i <= j < i + longest, of the greatest start[i] + end[j], the best first.

    All spans are compared, not only those between a few best starts and ends. Of equal ones the first and shortest wins.

    Args:
        start: of shape (tokens,), float64; -inf where no span may begin.
        end: likewise, where none may end.
        longest: tokens in a span.
        count: how many to return.

    Returns:
        (score, first token, last token); fewer than `count` where there are no more.
    """
    if not len(start):
        return []
    longest = min(longest, len(start))
    ends = np.concatenate([end, np.full(longest - 1, -np.inf)])
    scores = (start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)).ravel()  # (tokens * longest,)
    places = np.arange(len(scores))
    if count < len(scores):
        places = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    ranked = places[np.argsort(-scores[places], kind="stable")][:count]
    spans = ((float(scores[place]), *divmod(int(place), longest)) for place in ranked)
    return [(score, first, first + more) for score, first, more in spans if score > -math.inf]


def _without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without blanks at its ends, which tokens of bytes have."""
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
