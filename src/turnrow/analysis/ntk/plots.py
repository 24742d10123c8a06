"""Pictures of kernels: heat maps in class blocks, spectra, and bars of distances, as PNG or SVG.

Each function returns the picture as bytes and writes it where `path` is given, whose ending says the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turnrow.analysis.ntk.measures import Kernel, class_mean, spectrum
from turnrow.analysis.pictures import COLORS, LINES, Destination, finish, finished, new_figure
from turnrow.errors import UserError

__all__ = ["draw_distances", "draw_kernels", "draw_spectra"]


def draw_kernels(
    kernels: Mapping[str, Kernel],
    labels: Sequence[Any] | np.ndarray,
    path: Destination = None,
    *,
    kind: str | None = None,
) -> bytes:
    """Heat maps of kernels, samples sorted by class, each divided by its largest entry; lines part the classes.

    Args:
        kernels: by the names to show; of several outputs the mean over the classes is drawn.
        labels: the class of each sample.
        path: a file ending in .png or .svg, replaced atomically.
        kind: "png" (default) or "svg", where there is no path.
    """
    if not kernels:
        raise UserError("there are no kernels to draw: give at least one")
    values = np.asarray(labels)
    order = np.argsort(values, kind="stable")
    names, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    across = min(4, len(kernels))
    down = -(-len(kernels) // across)
    figure = new_figure(3.1 * across + 0.6, 3.2 * down)
    grid = np.atleast_1d(figure.subplots(down, across, squeeze=False)).ravel()
    image: Any = None
    for axes, (name, kernel) in zip(grid, kernels.items(), strict=False):
        matrix = class_mean(kernel)
        if matrix.shape != (len(values), len(values)):
            raise UserError(f"kernel {name!r} is of {matrix.shape} samples, but there are {len(values)} labels")
        matrix = matrix[np.ix_(order, order)]
        image = axes.imshow(matrix / max(np.abs(matrix).max(), np.finfo(float).tiny), cmap="RdBu_r", vmin=-1, vmax=1)
        for start in starts[1:]:
            axes.axhline(start - 0.5, color="black", linewidth=0.6)
            axes.axvline(start - 0.5, color="black", linewidth=0.6)
        middle = starts + (counts - 1) / 2
        axes.set_xticks(middle, [str(one) for one in names], fontsize=8)
        axes.set_yticks(middle, [str(one) for one in names], fontsize=8)
        axes.tick_params(length=0)
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
    for axes in grid[len(kernels) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.8, pad=0.02)
    bar.set_label("kernel / largest entry", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
    return finished(figure, path, kind)


def draw_spectra(kernels: Mapping[str, Kernel], path: Destination = None, *, kind: str | None = None) -> bytes:
    """Eigenvalues of kernels, each divided by the largest, on a logarithmic axis."""
    if not kernels:
        raise UserError("there are no kernels to draw: give at least one")
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    for number, (name, kernel) in enumerate(kernels.items()):
        values = spectrum(kernel)
        positive = values[values > values[0] * 1e-12] / values[0]
        color, line = COLORS[number % len(COLORS)], LINES[number // len(COLORS) % len(LINES)]
        axes.plot(np.arange(1, len(positive) + 1), positive, line, color=color, linewidth=1.6, label=name)
    axes.set_yscale("log")
    finish(axes, "Eigenvalues, relative to the largest")
    axes.set_xlabel("number", fontsize=9)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return finished(figure, path, kind)


def draw_distances(
    distances: Mapping[str, Mapping[str, float]],
    path: Destination = None,
    *,
    kind: str | None = None,
    title: str = "Relative distance to the full kernel",
) -> bytes:
    """Bars of numbers by method, grouped: ``{"rows": {"p = 1": 0.1, "p = 2": 0.15}, ...}``."""
    if not distances:
        raise UserError("there are no distances to draw: give at least one")
    groups = list(dict.fromkeys(group for row in distances.values() for group in row))
    figure = new_figure(7.5, 0.6 + 0.24 * len(distances) * (len(groups) + 0.8))
    axes = figure.subplots()
    height = 0.8 / len(groups)
    for number, group in enumerate(groups):
        places = np.arange(len(distances)) + (number - (len(groups) - 1) / 2) * height
        values = [row.get(group, float("nan")) for row in distances.values()]
        bars = axes.barh(places, values, height * 0.92, color=COLORS[number % len(COLORS)], label=group)
        axes.bar_label(bars, [f"{v:.3g}" if np.isfinite(v) else "" for v in values], padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(distances)), list(distances), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    finish(axes, title)
    axes.grid(False, axis="y")
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best")
    return finished(figure, path, kind)
