"""What a merge has cost where the merged weight had to be quantized anew.

Letters: W0 the weight before, W the weight that was wanted (W0 + delta, or R W0), Q(W) what the quantized layer holds; all
norms are Frobenius.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MergeCost", "merge_cost"]


@dataclass(frozen=True)
class MergeCost:
    """How far a merged weight is from what it should be."""

    error: float
    """|Q(W) - W|"""

    wanted: float
    """|W|"""

    change: float
    """|W - W0|"""

    @property
    def relative(self) -> float:
        """|Q(W) - W| / |W|"""
        return self.error / self.wanted if self.wanted else 0.0

    @property
    def of_change(self) -> float:
        """|Q(W) - W| / |W - W0|: at 1 and above, rounding has done as much to the weight as the adapter."""
        return self.error / self.change if self.change else math.inf if self.error else 0.0

    def __str__(self) -> str:
        return f"relative error {self.relative:.2e}, {self.of_change:.0%} of the adapter's change"

    @classmethod
    def sum(cls, costs: Iterable[MergeCost]) -> MergeCost:
        """The cost of several weights as if they were one."""
        costs = list(costs)
        error, wanted, change = (math.hypot(*(getattr(c, f) for c in costs)) for f in ("error", "wanted", "change"))
        return cls(error, wanted, change)


def merge_cost(held: Tensor, wanted: Tensor, before: Tensor) -> MergeCost:
    """The cost of one weight: Q(W), W and W0, each (out, in) float32."""
    return MergeCost(*(torch.linalg.vector_norm(t).item() for t in (held - wanted, wanted, wanted - before)))
