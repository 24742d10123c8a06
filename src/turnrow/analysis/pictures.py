"""How every picture of the analyses is begun and ended: one look, PNG or SVG, whole files only."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError, near_matches
from turnrow.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "LINES", "Destination", "finish", "finished", "new_figure"]

COLORS = ("#4269d0", "#e07a1f", "#2f9e6b", "#c2453a", "#8b5fbf", "#6b7785", "#b8860b", "#1f9bb4")
LINES = ("-", "--", ":", "-.")
_GRID = "#d9dee5"
_FORMATS = ("png", "svg")

Destination = str | os.PathLike[str] | None
"""Where a picture is written besides being returned; the ending says the format."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, not pyplot's: no display, no global state. Sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Any, title: str) -> None:
    """Give axes their title, a faint grid, and no frame."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.tick_params(labelsize=9, length=0)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def finished(figure: Figure, path: Destination, kind: str | None) -> bytes:
    """The picture as bytes, written to `path` too where it is given.

    Args:
        figure: all drawn.
        path: a file ending in .png or .svg, replaced atomically.
        kind: "png" or "svg"; None goes by the path, and is PNG without one.

    Raises:
        UserError: another format.
    """
    target = None if path is None else Path(path)
    chosen = kind if kind is not None else "png" if target is None else target.suffix.removeprefix(".").lower()
    if chosen not in _FORMATS:
        raise UserError(f"a picture cannot be {chosen!r}; it must be png or svg{near_matches(chosen, _FORMATS)}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=chosen)
    if target is not None:
        write_bytes(target, buffer.getvalue())
    return buffer.getvalue()
