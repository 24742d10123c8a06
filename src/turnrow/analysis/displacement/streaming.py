"""Mean, variance and quantiles of numbers that pass by, in memory that does not grow with how many there are.

Mean and variance are joined batch by batch (Chan, Golub and LeVeque, The American Statistician 1983). Quantiles come from counts in
buckets whose borders grow by a constant factor, so that each is right to a relative accuracy (DDSketch: Masson, Rim and Lee, VLDB
2019, arXiv:1908.10693); the range is fixed, and what lies below or above it counts in the first or last bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from turnrow.errors import UserError

__all__ = ["QUANTILES", "RunningNumbers", "Summary"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ACCURACY = 0.01
"""A quantile is within this share of the number that it stands for."""
_LEAST, _GREATEST = 1e-12, 1e6
_FACTOR = (1 + ACCURACY) / (1 - ACCURACY)
_BUCKETS = math.ceil(math.log(_GREATEST / _LEAST) / math.log(_FACTOR)) + 1


@dataclass(frozen=True)
class Summary:
    """What is known of some numbers."""

    count: int
    mean: float
    std: float
    """Standard deviation, dividing by count; 0 of a single number."""
    least: float
    greatest: float
    quantiles: dict[float, float]
    """By share, see `QUANTILES`; to a relative accuracy of 1 %, of numbers from 1e-12 to 1e6."""

    @property
    def median(self) -> float:
        """The quantile of a half."""
        return self.quantiles[0.5]


class RunningNumbers:
    """Takes finite numbers from 0 batch by batch and says mean, spread and quantiles of all of them."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0
        self._least, self._greatest = math.inf, -math.inf
        self._zeros = 0
        self._buckets = np.zeros(_BUCKETS, dtype=np.int64)

    @property
    def count(self) -> int:
        """How many there were."""
        return self._count

    def add(self, values: Tensor) -> None:
        """Take some more, of any shape; finite and not negative."""
        new = values.detach().double().cpu().numpy().ravel()
        if not new.size:
            return
        mean, total = float(new.mean()), self._count + new.size
        apart = mean - self._mean
        self._squares += float(np.square(new - mean).sum()) + apart**2 * self._count * new.size / total
        self._mean += apart * new.size / total
        self._count = total
        self._least, self._greatest = min(self._least, float(new.min())), max(self._greatest, float(new.max()))
        positive = new[new > 0]
        self._zeros += new.size - positive.size
        at = np.ceil(np.log(np.maximum(positive, _LEAST) / _LEAST) / math.log(_FACTOR)).astype(np.int64)
        np.add.at(self._buckets, np.minimum(at, _BUCKETS - 1), 1)

    def summary(self, quantiles: Sequence[float] = QUANTILES) -> Summary:
        """What is known of the numbers so far.

        Raises:
            UserError: there were none.
        """
        if not self._count:
            raise UserError("there are no numbers to summarize")
        return Summary(
            self._count,
            self._mean,
            math.sqrt(self._squares / self._count),
            self._least,
            self._greatest,
            {share: self._quantile(share) for share in quantiles},
        )

    def _quantile(self, share: float) -> float:
        """The number of rank share * (count - 1), as its bucket stands for it, within what was seen."""
        rank = share * (self._count - 1)
        if rank < self._zeros:
            return 0.0
        bucket = int(np.searchsorted(self._zeros + np.cumsum(self._buckets), rank, side="right"))
        # The number whose greatest relative distance to any other in the bucket is least.
        stands_for = _LEAST * _FACTOR**bucket * 2 / (1 + _FACTOR)
        return min(max(stands_for, self._least), self._greatest)
