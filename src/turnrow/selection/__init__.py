"""Which rows, columns or entries of a weight matrix are trained: statistics in, index tensors out."""

from __future__ import annotations

from turnrow.selection.indices import check_indices
from turnrow.selection.strategies import (
    STRATEGIES,
    Part,
    Strategy,
    check_strategy,
    choose,
    choose_by_score,
    first,
    needs_data,
)

__all__ = [
    "STRATEGIES",
    "Part",
    "Strategy",
    "check_indices",
    "check_strategy",
    "choose",
    "choose_by_score",
    "first",
    "needs_data",
]
