"""The search of a learning rate on the validation split: the same for every method."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.suite.suite import Rates

__all__ = ["best_rate", "next_rates"]


def next_rates(tried: Mapping[float, float], rates: Rates) -> list[float]:
    """The learning rates to try after those tried: the first ones, then beyond the best while it is the least or greatest.

    Args:
        tried: scores by learning rate; more is better.
        rates: the grid.
    """
    if not tried:
        return list(rates.first)
    place = rates.grid.index(best_rate(tried))
    return [rate for rate in rates.grid[max(0, place - 1) : place + 2] if rate not in tried]


def best_rate(tried: Mapping[float, float]) -> float:
    """The learning rate of the highest score; of equals the lower."""
    return max(tried, key=lambda rate: (tried[rate], -rate))
