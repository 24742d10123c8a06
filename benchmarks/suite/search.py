"""The search of a learning rate on the validation split: the same for every method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.suite.suite import Rates

__all__ = ["best_rate", "next_rates", "of_seed", "score"]

Run = Mapping[str, Any]
"""The file of a run, see `store`."""


def next_rates(tried: Mapping[float, Run], rates: Rates) -> list[float]:
    """The learning rates to try after those tried: the first ones, then beyond the best while it is the least or greatest.

    While no run has learnt more than to give the same answer to every row, it is not known which way to go: both ways, to the ends of the grid.

    Args:
        tried: runs by learning rate.
        rates: the grid.
    """
    if not tried:
        return list(rates.first)
    best = best_rate(tried)
    near = [rates.grid.index(rate) for rate in ([best] if _has_learnt(tried[best]) else tried)]
    return [rate for rate in rates.grid[max(0, min(near) - 1) : max(near) + 2] if rate not in tried]


def best_rate(tried: Mapping[float, Run]) -> float:
    """The learning rate of the highest score on the validation split; of equals the lower."""
    return max(tried, key=lambda rate: (score(tried[rate], "validation"), -rate))


def score(run: Run, split: str) -> float:
    """The main metric of a run, negative where less is better; minus infinity where it failed or the metric is not a number."""
    value = float("nan") if "failed" in run else float(run[split][run["main_metric"]])
    if math.isnan(value):
        return float("-inf")
    return value if run["greater_is_better"] else -value


def of_seed(runs: Iterable[Run], seed: int) -> dict[float, Run]:
    """The runs of one seed by learning rate."""
    return {run["learning_rate"]: run for run in runs if run["seed"] == seed}


def _has_learnt(run: Run) -> bool:
    """Matthews' correlation is exactly 0 where one class is predicted throughout; other tasks have no such answer."""
    return score(run, "validation") > float("-inf") and run["validation"].get("matthews_correlation") != 0
