"""Tangent kernels of every method from one pass, kernel regression on them, distances between them, and pictures."""

from __future__ import annotations

from turnrow.analysis.ntk.descriptions import (
    DESCRIPTIONS,
    IA3,
    BitFit,
    Columns,
    Description,
    Entries,
    Everything,
    Full,
    LayerNorm,
    LoRA,
    Road,
    Rows,
    RowsAndColumns,
)
from turnrow.analysis.ntk.factors import Batch, Call, Outputs, factors
from turnrow.analysis.ntk.kernels import TangentKernel, TangentKernels, tangent_kernels
from turnrow.analysis.ntk.outputs import CausalLabelWords, CentroidHead, ClassifierHead, MaskedLabelWords, mean_pooled

__all__ = [
    "DESCRIPTIONS",
    "IA3",
    "Batch",
    "BitFit",
    "Call",
    "CausalLabelWords",
    "CentroidHead",
    "ClassifierHead",
    "Columns",
    "Description",
    "Entries",
    "Everything",
    "Full",
    "LayerNorm",
    "LoRA",
    "MaskedLabelWords",
    "Outputs",
    "Road",
    "Rows",
    "RowsAndColumns",
    "TangentKernel",
    "TangentKernels",
    "factors",
    "mean_pooled",
    "tangent_kernels",
]
