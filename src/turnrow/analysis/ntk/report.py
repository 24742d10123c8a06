"""Kernels on one page: a single HTML file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turnrow.analysis.ntk import plots
from turnrow.analysis.ntk.kernels import TangentKernel
from turnrow.analysis.ntk.measures import effective_dimension, label_alignment, relative_distance, spectrum
from turnrow.analysis.pages import write_page
from turnrow.errors import UserError, near_matches

__all__ = ["kernel_figures", "write_report"]


def kernel_figures(
    kernels: Mapping[str, TangentKernel], labels: Sequence[Any] | np.ndarray, reference: str
) -> dict[str, dict[str, float]]:
    """What the page says of each kernel.

    By name: "parameters"; "p = 1" and "p = 2", the relative distances to the reference; "alignment" with the labels;
    "dimension", the effective dimension with lambda a hundredth of the mean eigenvalue.
    """
    if reference not in kernels:
        raise UserError(f"reference is {reference!r}, which is none of the kernels{near_matches(reference, kernels)}")
    full = kernels[reference]
    return {
        name: {
            "parameters": kernel.parameters,
            "p = 1": relative_distance(kernel, full, p=1),
            "p = 2": relative_distance(kernel, full, p=2),
            "alignment": label_alignment(kernel, labels),
            "dimension": effective_dimension(kernel, float(spectrum(kernel).mean()) / 100),
        }
        for name, kernel in kernels.items()
    }


def write_report(
    path: str | os.PathLike[str],
    kernels: Mapping[str, TangentKernel],
    labels: Sequence[Any] | np.ndarray,
    *,
    reference: str = "full",
    title: str = "Tangent kernels",
    subtitle: str = "",
) -> None:
    """Write the page, its pictures inside.

    Args:
        path: the file, replaced atomically.
        kernels: by the names to show.
        labels: the class of each training sample.
        reference: the kernel that the others are compared with.
        title, subtitle: shown on top.
    """
    figures = kernel_figures(kernels, labels, reference)
    distances = {name: {p: row[p] for p in ("p = 1", "p = 2")} for name, row in figures.items() if name != reference}
    pictures = {
        "heat": plots.draw_kernels(kernels, labels),
        "spectra": plots.draw_spectra(kernels),
        **(
            {"distances": plots.draw_distances(distances, title=f"Relative distance to {reference!r}")}
            if distances
            else {}
        ),
    }
    n, _, c, _ = kernels[reference].train.shape
    values = {
        "title": title,
        "subtitle": subtitle,
        "reference": reference,
        "samples": n,
        "outputs": c,
        "figures": figures,
    }
    write_page(path, "analysis/ntk/report.html.j2", values, pictures)
