"""The search of a learning rate on the validation split: the same for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.suite.suite import Rates

__all__ = ["best_rate", "best_searched", "has_learnt", "next_rates", "still_wanted", "validation_score"]


def next_rates(tried: Mapping[float, float], rates: Rates, learnt: bool = True) -> list[float]:
    """The learning rates to try after those tried: the first ones, then beyond the best while it is the least or greatest.

    Args:
        tried: scores by learning rate; more is better.
        rates: the grid.
        learnt: whether the best of them has learnt anything. While none has, it is not known which way to go: both ways, to the ends of the grid.
    """
    if not tried:
        return list(rates.first)
    around = [rates.grid.index(rate) for rate in ([best_rate(tried)] if learnt else tried)]
    return [rate for rate in rates.grid[max(0, min(around) - 1) : max(around) + 2] if rate not in tried]


def still_wanted(runs: Mapping[float, Mapping[str, Any]], rates: Rates) -> list[float]:
    """`next_rates` after some runs of the first seed, by learning rate; none once the search is finished."""
    scores = {rate: validation_score(run) for rate, run in runs.items()}
    return next_rates(scores, rates, not runs or has_learnt(runs[best_searched(runs)]))


def best_searched(runs: Mapping[float, Mapping[str, Any]]) -> float:
    """The `best_rate` of some runs of the first seed, by learning rate."""
    return best_rate({rate: validation_score(run) for rate, run in runs.items()})


def best_rate(tried: Mapping[float, float]) -> float:
    """The learning rate of the highest score; of equals the lower."""
    return max(tried, key=lambda rate: (tried[rate], -rate))


def validation_score(run: Mapping[str, Any]) -> float:
    """The main metric of a run on the validation split, negative where less is better; minus infinity of one that failed or gave no number.

    Args:
        run: its file, see `store`.
    """
    value = float("nan") if "failed" in run else float(run["validation"][run["main_metric"]])
    if math.isnan(value):
        return float("-inf")
    return value if run["greater_is_better"] else -value


def has_learnt(run: Mapping[str, Any]) -> bool:
    """Whether a run did not fail, and answers differently from row to row where that can be told: one class throughout has Matthews' correlation 0."""
    return validation_score(run) > float("-inf") and run["validation"].get("matthews_correlation") != 0
