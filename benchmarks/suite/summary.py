"""What is known of a method on a task: the seeds at the learning rate that was best on validation."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import plus_minus
from benchmarks.suite.search import best_searched, still_wanted
from benchmarks.suite.store import RUNS, Store
from benchmarks.suite.suite import Cell, Suite

__all__ = ["Summary", "failures", "known_tasks", "percent", "summarize"]

# In these units they are what papers print.
_AS_IT_IS = ("perplexity", "loss", "bits_per_byte", "mse")


@dataclass(frozen=True)
class Summary:
    """The runs of one cell that were evaluated on the test split."""

    trained: int
    """Trained parameters, the head included."""
    learning_rate: float
    metric: str
    greater_is_better: bool
    scores: tuple[float, ...]
    """Main metric on the test split, one a seed; a share as a percentage."""
    searching: bool
    """Whether learning rates are left to try, so that another one may turn out to be better."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds, of a sample; None of one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def score(self) -> str:
        """Mean ± deviation, with one decimal, and ``*`` while learning rates are left to try."""
        return plus_minus(self.scores) + ("*" if self.searching else "")

    def text(self) -> str:
        """`score`, and the number of seeds where there are not yet three."""
        return self.score() + (f" ({len(self.scores)})" if len(self.scores) < 3 else "")


def summarize(cell: Cell, root: Path = RUNS) -> Summary | None:
    """What is known of a cell so far, at the learning rate that is best by now; None while no run at it is evaluated on the test split."""
    every = Store(cell, root).runs()
    searched = {run["learning_rate"]: run for run in every if run["seed"] == cell.seeds[0]}
    best = best_searched(searched) if searched else None
    # Runs at another rate were evaluated before the search went on.
    runs = sorted((run for run in every if run["learning_rate"] == best and "test" in run), key=lambda run: run["seed"])
    if not runs:
        return None
    metric = runs[0]["main_metric"]
    return Summary(
        trained=runs[0]["trainable_parameters"],
        learning_rate=runs[0]["learning_rate"],
        metric=metric,
        greater_is_better=runs[0]["greater_is_better"],
        scores=tuple(percent(metric, run["test"][metric]) for run in runs),
        searching=bool(still_wanted(searched, cell.rates)),
    )


def known_tasks(suite: Suite, root: Path = RUNS) -> list[str]:
    """The tasks of a suite of which something is known."""
    return [task for task in suite.tasks if any(summarize(cell, root) for cell in suite.cells((task,)))]


def percent(metric: str, value: float) -> float:
    """A metric as tables print it."""
    return value if metric in _AS_IT_IS else 100 * value


def failures(cell: Cell, root: Path = RUNS) -> list[dict[str, Any]]:
    """The runs of a cell that failed."""
    return [run for run in Store(cell, root).runs() if "failed" in run]
