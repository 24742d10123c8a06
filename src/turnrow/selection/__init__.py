"""Which rows, columns or entries of a weight matrix are trained: statistics in, index tensors out."""

from __future__ import annotations

from turnrow.selection.gathering import Batch, gather
from turnrow.selection.indices import check_form, check_indices, plural
from turnrow.selection.result import Chosen, Selection, read_indices
from turnrow.selection.statistics import ExpertInputNorms, GradientSums, InputNorms, real_tokens, weight_gradient
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
    "Batch",
    "Chosen",
    "ExpertInputNorms",
    "GradientSums",
    "InputNorms",
    "Part",
    "Selection",
    "Strategy",
    "check_form",
    "check_indices",
    "check_strategy",
    "choose",
    "choose_by_score",
    "first",
    "gather",
    "needs_data",
    "plural",
    "read_indices",
    "real_tokens",
    "weight_gradient",
]
