"""Which rows or columns of a weight matrix are trained: statistics in, index tensors out."""

from __future__ import annotations

from turnrow.selection.indices import check_indices
from turnrow.selection.strategies import first

__all__ = ["check_indices", "first"]
