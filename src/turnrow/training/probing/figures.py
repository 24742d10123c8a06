"""What a probe says."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from turnrow.training.methods import check_method, method_title

__all__ = ["MethodProbe", "Probe"]

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class MethodProbe:
    """What is expected of one method."""

    title: str
    method: dict[str, Any]
    """The `method` section of a recipe."""
    trainable_parameters: int | None = None
    """With the head."""
    scores: tuple[float, ...] = ()
    """The task's main metric on held-out rows, one a draw of training rows; empty where there is no kernel."""
    distances: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Relative distance of the kernel to that of full fine-tuning, by ``"p = 1"`` and ``"p = 2"``, one a draw."""
    step_seconds: float | None = None
    """A training step on a batch of the recipe's size, measured on this machine; None if it was not."""
    peak_bytes: int | None = None
    """The forecast of `turnrow.training.plan` for such a batch."""
    note: str | None = None
    """What is missing, and why."""

    @property
    def score(self) -> float | None:
        """The mean over the draws."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over the draws; None of fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def distance(self, p: int) -> float | None:
        """The mean over the draws of the distance by this norm."""
        found = self.distances.get(f"p = {p}", ())
        return statistics.fmean(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a probe found, the most promising method first."""

    model: str
    task: str
    """The data set that the recipe names, or else the kind of task."""
    metric: str
    outputs: str
    """Of which function of the model the kernels are, in words."""
    shots: int
    """Training rows of each class in a draw."""
    held_rows: int
    """Rows that a draw is scored on."""
    held_from: str
    """Where those are from."""
    seeds: tuple[int, ...]
    """One a draw."""
    start_scores: tuple[float, ...]
    """The metric of the outputs before any training, one a draw."""
    batch: int
    """Rows of the batch whose step was measured and planned."""
    sequence: int
    """Tokens of its rows."""
    device: str
    threads: int
    seconds: float
    """That the probe took."""
    methods: tuple[MethodProbe, ...]

    def of(self, method: Mapping[str, Any]) -> MethodProbe:
        """What was found of a `method` section, as it was given to the probe (KeyError: it was not)."""
        wanted = check_method(method)
        for one in self.methods:
            if one.method == wanted:
                return one
        raise KeyError(method_title(wanted))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return {"version": _FORMAT, **asdict(self)}
