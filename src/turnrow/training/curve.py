"""The picture of a run: loss and main metric over the steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from turnrow.files import write_bytes

__all__ = ["draw_curve"]

_TRAIN, _VALIDATION, _TEST, _GRID = "#4269d0", "#e07a1f", "#2f9e6b", "#d9dee5"


def draw_curve(path: Path, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Write a PNG with two panels: losses, and the main metric on validation (line) and test (before and after).

    Args:
        path: the file, replaced atomically.
        history: Trainer's log entries.
        metrics: as in ``metrics.json``.
    """
    name = metrics["main_metric"]
    # A figure of its own, not pyplot's: no display, no global state.
    figure = Figure(figsize=(10, 3.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)

    _line(losses, history, "loss", "train", _TRAIN)
    _line(losses, history, "eval_loss", "validation", _VALIDATION, marker="o")
    _finish(losses, "Loss")

    _line(scores, history, f"eval_{name}", "validation", _VALIDATION, marker="o")
    before, after, end = metrics["before"].get(name), metrics["after"].get(name), metrics["checkpoint_step"]
    if before is not None and after is not None:
        scores.plot([0, end], [before, after], ":", color=_TEST, linewidth=1)
        scores.plot([0, end], [before, after], "D", color=_TEST, markersize=6, label="test, before and after")
        scores.annotate(f"{before:.3f}", (0, before), (6, 6), textcoords="offset points", color=_TEST, fontsize=9)
        scores.annotate(
            f"{after:.3f}", (end, after), (-6, -14), textcoords="offset points", color=_TEST, fontsize=9, ha="right"
        )
    _finish(scores, name.replace("_", " ").capitalize())

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def _line(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, label: str, color: str, marker: str = "") -> None:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.6, marker=marker, markersize=4)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
