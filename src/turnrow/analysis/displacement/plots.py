"""Pictures of displacement: over the layers, and over the tokens of a text. PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from turnrow.analysis.displacement.displacement import Displacement
from turnrow.analysis.displacement.tokens import TokenKind
from turnrow.analysis.pictures import COLORS, Destination, finish, finished, new_figure
from turnrow.errors import UserError

__all__ = ["draw_displacement", "draw_tokens"]


def draw_displacement(
    found: Displacement,
    path: Destination = None,
    *,
    tokens: Sequence[TokenKind] = ("first", "content", "last"),
    kind: str | None = None,
) -> bytes:
    """Median of both measures over the layers, a line for a kind of token, with the middle half of the tokens around it.

    Args:
        found: what was measured.
        path: a file ending in .png or .svg, replaced atomically.
        tokens: the kinds to show.
        kind: "png" (default) or "svg", where there is no path.
    """
    names = list(found.layers)
    figure = new_figure(9.5, 3.6)
    panels = figure.subplots(1, 2)
    titles = ("Length: | ‖x‖ − ‖x0‖ | / ‖x0‖", "Direction: 1 − cos(x, x0)")
    for axes, measure, title in zip(panels, ("magnitude", "turn"), titles, strict=True):
        for color, token in zip(COLORS, tokens, strict=False):
            at = [number for number, name in enumerate(names) if token in found.layers[name]]
            if not at:
                continue
            summaries = [getattr(found.layers[names[number]][token], measure) for number in at]
            low, middle, high = (np.array([one.quantiles[share] for one in summaries]) for share in (0.25, 0.5, 0.75))
            axes.plot(at, middle, color=color, linewidth=1.6, marker="o", markersize=3.5, label=token)
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        finish(axes, title)
        _name_layers(axes, names)
        axes.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return finished(figure, path, kind)


def draw_tokens(
    turn: Tensor,
    layers: Sequence[str],
    tokens: Sequence[str],
    path: Destination = None,
    *,
    title: str = "1 − cos(x, x0)",
    kind: str | None = None,
) -> bytes:
    """How far each token of a text was turned in each layer.

    Args:
        turn: (layers, tokens).
        layers, tokens: their names.
        path, kind: as above.
        title: above the picture.
    """
    values = turn.double().numpy()
    if values.shape != (len(layers), len(tokens)):
        raise UserError(f"there are {values.shape} numbers for {len(layers)} layers and {len(tokens)} tokens")
    figure = new_figure(min(24.0, max(6.0, 2.2 + 0.34 * len(tokens))), max(2.4, 1.4 + 0.24 * len(layers)))
    axes = figure.subplots()
    greatest = max(float(np.nanmax(values)), float(np.finfo(float).tiny))
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=greatest, aspect="auto", origin="lower")
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    return finished(figure, path, kind)


def _name_layers(axes: Any, names: Sequence[str]) -> None:
    """At most a dozen names, shortened to their number where all are layers of one stack; 0 are the embeddings."""
    short = ["0" if name == "embeddings" else name.removeprefix("layer ") for name in names]
    each = -(-len(names) // 14)
    axes.set_xticks(range(0, len(names), each), short[::each], fontsize=8)
    if max(map(len, short)) > 10:
        axes.tick_params(axis="x", rotation=30)
    axes.set_xlabel("layer", fontsize=9)
