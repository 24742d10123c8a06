"""What an adapter changed, and where: weights, rows, angles, and the tokens whose states it turned."""

from __future__ import annotations

from turnrow.analysis.explain.explanation import Explanation
from turnrow.analysis.explain.plots import draw_parts, draw_spectra, draw_turning, draw_weights
from turnrow.analysis.explain.report import write_report
from turnrow.analysis.explain.tokens import TextTurned, TokenMoved, TokenRanking
from turnrow.analysis.explain.turning import Turning
from turnrow.analysis.explain.weights import MovedPart, WeightMovement, effective_rank, measure, singular_values

__all__ = [
    "Explanation",
    "MovedPart",
    "TextTurned",
    "TokenMoved",
    "TokenRanking",
    "Turning",
    "WeightMovement",
    "draw_parts",
    "draw_spectra",
    "draw_turning",
    "draw_weights",
    "effective_rank",
    "measure",
    "singular_values",
    "write_report",
]
