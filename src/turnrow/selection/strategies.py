"""Selection strategies: functions from the size of a dimension (and statistics of it) to r indices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first"]


def first(size: int, r: int) -> Tensor:
    """The first r of `size` rows or columns, (r,) int64: the default of the RoCoFT paper."""
    return torch.arange(r)
