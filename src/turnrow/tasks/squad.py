"""How answers to questions are scored: the measures of SQuAD, for one answer and for a choice between answer and none.

The rules are those of the data sets' own scorers (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822): case,
punctuation, English articles and white space do not count; of several gold answers the one counts that fits best.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from turnrow.errors import UserError

__all__ = ["best_over", "best_threshold", "exact_match", "normalize_answer", "token_f1"]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single blanks between the words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if both are the same once normalized, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def token_f1(prediction: str, gold: str) -> float:
    """The harmonic mean of precision and recall over the words; of two texts without words, 1, of one such, 0."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))


def best_over(measure: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    """The best that `prediction` reaches against any of the gold answers; without any, the right prediction is ``""``.

    Gold answers of which normalization leaves nothing count only where there is no other, as in the scorer of SQuAD 2.0.
    """
    return max(measure(prediction, gold) for gold in [g for g in golds if normalize_answer(g)] or [""])


def best_threshold(
    rows: Sequence[Mapping[str, Any]], *, answers: str = "answers", metric: str = "f1"
) -> tuple[float, float]:
    """Choose `no_answer_threshold` of the task ``extractive_qa`` by rows with gold answers. Never by those of a test split.

    A question is said to have no answer where ``null_score_difference`` exceeds the threshold.

    Args:
        rows: as ``predict`` returns them for a validation split: each with ``null_score_difference``, ``best_answer`` and
            the gold answers.
        answers: the column of the gold answers, ``{"text": [...], ...}`` or a list of texts; empty: there is none.
        metric: ``f1`` or ``exact_match``.

    Returns:
        The threshold, halfway between the two differences that it divides (of several equally good ones the nearest to
        0), and the mean of the metric that it gives on these rows.

    Raises:
        UserError: there are no rows, or they lack what is needed.
    """
    measures = {"f1": token_f1, "exact_match": exact_match}
    if metric not in measures:
        raise UserError(f"a threshold is chosen by f1 or exact_match, got {metric!r}")
    if not rows:
        raise UserError("a threshold is chosen by rows with gold answers, and there are none")
    for number, row in enumerate(rows, start=1):
        for name in ("null_score_difference", "best_answer", answers):
            if row.get(name) is None:
                raise UserError(
                    f"row {number} has no {name!r}; a threshold is chosen by what predict returns for a validation split "
                    "whose questions may have no answer"
                )
    golds = [gold["text"] if isinstance(gold := row[answers], Mapping) else gold for row in rows]
    answered = [best_over(measures[metric], row["best_answer"], gold) for row, gold in zip(rows, golds, strict=True)]
    silent = [best_over(measures[metric], "", gold) for gold in golds]
    return _best_cut(np.array([row["null_score_difference"] for row in rows], dtype=np.float64), answered, silent)


def _best_cut(differences: np.ndarray, answered: Sequence[float], silent: Sequence[float]) -> tuple[float, float]:
    """Where to divide the differences, so that the ones up to it score `answered` and the others `silent`."""
    order = np.argsort(differences, kind="stable")
    ordered = differences[order]
    gained = np.concatenate([[0.0], np.cumsum(np.asarray(answered)[order])])
    lost = np.concatenate([[0.0], np.cumsum(np.asarray(silent)[order])])
    totals = gained + lost[-1] - lost
    # One unit beyond the outermost; between equal differences there is no room for a threshold.
    cuts = np.concatenate([[ordered[0] - 1], (ordered[:-1] + ordered[1:]) / 2, [ordered[-1] + 1]])
    possible = np.concatenate([[True], ordered[:-1] < ordered[1:], [True]])
    best = max(np.flatnonzero(possible), key=lambda place: (totals[place], -abs(cuts[place])))
    return float(cuts[best]), float(totals[best] / len(ordered))
