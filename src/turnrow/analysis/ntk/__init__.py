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
from turnrow.analysis.ntk.measures import (
    Movement,
    alignment,
    class_mean,
    effective_dimension,
    label_alignment,
    movement,
    relative_distance,
    spectrum,
)
from turnrow.analysis.ntk.outputs import CausalLabelWords, CentroidHead, ClassifierHead, MaskedLabelWords, mean_pooled
from turnrow.analysis.ntk.plots import draw_distances, draw_kernels, draw_spectra
from turnrow.analysis.ntk.regression import KernelLogisticRegression
from turnrow.analysis.ntk.report import kernel_figures, write_report

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
    "KernelLogisticRegression",
    "LayerNorm",
    "LoRA",
    "MaskedLabelWords",
    "Movement",
    "Outputs",
    "Road",
    "Rows",
    "RowsAndColumns",
    "TangentKernel",
    "TangentKernels",
    "alignment",
    "class_mean",
    "draw_distances",
    "draw_kernels",
    "draw_spectra",
    "effective_dimension",
    "factors",
    "kernel_figures",
    "label_alignment",
    "mean_pooled",
    "movement",
    "relative_distance",
    "spectrum",
    "tangent_kernels",
    "write_report",
]
