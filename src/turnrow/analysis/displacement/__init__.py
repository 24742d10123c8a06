"""How fine-tuning moved hidden states: their lengths and directions, and what a classifier can tell by either alone."""

from __future__ import annotations

from turnrow.analysis.displacement.disentanglement import (
    PARTS,
    Disentangled,
    DisentangledHead,
    Labelled,
    Part,
    Pooling,
    disentangle,
    fit_head,
    pool_states,
    sentence_states,
)
from turnrow.analysis.displacement.displacement import (
    Displacement,
    Moved,
    TokenDisplacement,
    displacement,
    token_displacement,
)
from turnrow.analysis.displacement.measures import angular_change, magnitude_change, turn
from turnrow.analysis.displacement.plots import draw_displacement, draw_tokens
from turnrow.analysis.displacement.streaming import RunningNumbers, Summary
from turnrow.analysis.displacement.tokens import KINDS, TokenKind, kinds_of, real_tokens

__all__ = [
    "KINDS",
    "PARTS",
    "Disentangled",
    "DisentangledHead",
    "Displacement",
    "Labelled",
    "Moved",
    "Part",
    "Pooling",
    "RunningNumbers",
    "Summary",
    "TokenDisplacement",
    "TokenKind",
    "angular_change",
    "disentangle",
    "displacement",
    "draw_displacement",
    "draw_tokens",
    "fit_head",
    "kinds_of",
    "magnitude_change",
    "pool_states",
    "real_tokens",
    "sentence_states",
    "token_displacement",
    "turn",
]
