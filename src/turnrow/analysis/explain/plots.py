"""Pictures of what an adapter changed: where, by how many directions, which rows, how far the pairs. PNG or SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from turnrow.analysis.explain.explanation import Explanation, place_of
from turnrow.analysis.explain.weights import WeightMovement
from turnrow.analysis.pictures import COLORS, LINES, Destination, finish, finished, new_figure
from turnrow.errors import UserError

__all__ = ["draw_parts", "draw_spectra", "draw_turning", "draw_weights"]

_BARS = 30
_SPECTRA = 8


def draw_weights(found: Explanation, path: Destination = None, *, kind: str | None = None) -> bytes:
    """How far each matrix moved, by layer and place in it; bars of the furthest where the names tell no layers.

    Biases and norms are left out where there are matrices: they would take all of the color.
    Shown is the norm of the change over that of the weight; where the base is not known the norm, or of RoAd the median angle.

    Args:
        found: what was measured.
        path: a file ending in .png or .svg, replaced atomically.
        kind: "png" (default) or "svg", where there is no path.

    Raises:
        UserError: nothing changed.
    """
    if not found.weights:
        raise UserError("no weight changed, so there is nothing to draw")
    shown = [weight for weight in found.weights if weight.is_matrix] or found.weights
    measure, title = _measure(shown)
    layers, roles, names = _rows_of(shown)
    if len([layer for layer in layers if layer is not None]) < 2 or len(roles) > 60:
        return _bars(shown, measure, title, path, kind)
    grid = np.full((len(roles), len(layers)), np.nan)
    for weight in shown:
        layer, role = place_of(weight.name)
        value = measure(weight)
        grid[roles.index(role), layers.index(layer)] = np.nan if value is None else value
    figure = new_figure(
        min(24.0, 1.9 + 0.068 * max(map(len, names)) + 0.5 * len(layers)), max(2.2, 1.2 + 0.27 * len(roles))
    )
    axes = figure.subplots()
    # What lies in no layer, such as a pooler, may move far further; its number says so, and the color is for the layers.
    greatest = max(float(np.nanmax(grid[:, [layer is not None for layer in layers]])), 1e-30)
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=greatest, aspect="auto")
    axes.set_xticks(range(len(layers)), _layer_names(layers), fontsize=8)
    axes.set_yticks(range(len(roles)), names, fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for side in axes.spines.values():
        side.set_visible(False)
    if len(layers) <= 16:
        _write_numbers(axes, grid, greatest)
    bar = figure.colorbar(
        image, ax=axes, shrink=0.9, pad=0.015, extend="max" if np.nanmax(grid) > greatest else "neither"
    )
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    return finished(figure, path, kind)


def draw_spectra(found: Explanation, path: Destination = None, *, kind: str | None = None) -> bytes:
    """Singular values of the changes that moved furthest.

    Raises:
        UserError: no change is known.
    """
    shown = [weight for weight in found.weights if len(weight.singular_values) > 1][:_SPECTRA]
    shown = shown or [weight for weight in found.weights if weight.singular_values][:_SPECTRA]
    if not shown:
        raise UserError("no change is known, so there are no singular values to draw")
    figure = new_figure(9.5, 3.8)
    axes = figure.subplots()
    for number, weight in enumerate(shown):
        values = np.array(weight.singular_values)
        values = values[values > values[0] * 1e-6]
        style, color = LINES[number // len(COLORS) % len(LINES)], COLORS[number % len(COLORS)]
        marker = "o" if len(values) <= 16 else ""
        axes.plot(
            np.arange(1, len(values) + 1),
            values,
            style,
            color=color,
            linewidth=1.5,
            label=weight.name,
            marker=marker,
            markersize=3.5,
        )
    _log(axes)
    finish(axes, "Singular values of the change")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.set_xlabel("number", fontsize=9)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return finished(figure, path, kind)


def draw_turning(found: Explanation, path: Destination = None, *, kind: str | None = None) -> bytes:
    """Angles and scales of all pairs of a RoAd adapter.

    Raises:
        UserError: it turns nothing.
    """
    turning = found.turning
    if turning is None:
        raise UserError("nothing is turned, so there are no angles to draw")
    figure = new_figure(9.5, 3.2)
    left, right = figure.subplots(1, 2)
    moved = (turning.angles.abs() > 0) | (turning.scales != 1).any(1)
    left.hist(np.rad2deg(turning.angles[moved].numpy()), bins=80, color=COLORS[0])
    finish(left, "Angles of the pairs, in degrees")
    left.set_ylabel("pairs", fontsize=9)
    right.hist(turning.scales[moved].flatten().numpy(), bins=80, color=COLORS[1])
    finish(right, "Scales of the pairs, two each")
    return finished(figure, path, kind)


def draw_parts(found: Explanation, path: Destination = None, *, kind: str | None = None) -> bytes:
    """How far each trained row, column or entry of a RoCoFT adapter moved, by layer.

    Raises:
        UserError: it has none.
    """
    held = [(weight, part, moved) for weight in found.weights for part, moved in weight.parts.items()]
    if not held:
        raise UserError("no rows, columns or entries were trained, so there are none to draw")
    relative = all(moved.relative is not None for _, _, moved in held)
    layers, roles, short = _rows_of([weight for weight, _, _ in held])
    kinds = sorted({(roles.index(place_of(weight.name)[1]), part) for weight, part, _ in held})
    several = len({part for _, part in kinds}) > 1
    figure = new_figure(9.5, 4.0)
    axes = figure.subplots()
    for number, (row, part) in enumerate(kinds):
        x: list[float] = []
        y: list[float] = []
        for weight, own_part, moved in held:
            layer, role = place_of(weight.name)
            if (role, own_part) == (roles[row], part):
                values = moved.relative if relative and moved.relative is not None else moved.norms
                y += values
                x += [layers.index(layer) + (number - (len(kinds) - 1) / 2) * 0.7 / len(kinds)] * len(values)
        color, name = COLORS[number % len(COLORS)], f"{short[row]}, {part}" if several else short[row]
        fill = color if number < len(COLORS) else "none"
        axes.plot(x, y, "o", color=color, markersize=3.5, alpha=0.7, label=name, markerfacecolor=fill)
    _log(axes)
    what = "/".join(sorted({part for _, part in kinds}))
    finish(axes, f"How far each {what} moved" + (", over its own norm" if relative else ""))
    axes.set_xticks(range(len(layers)), _layer_names(layers), fontsize=8)
    axes.grid(False, axis="x")
    axes.set_xlabel("layer", fontsize=9)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return finished(figure, path, kind)


def _measure(weights: Sequence[WeightMovement]) -> tuple[Callable[[WeightMovement], float | None], str]:
    if any(weight.relative is not None for weight in weights):
        return (lambda weight: weight.relative), "‖ΔW‖ / ‖W‖"
    if any(weight.norm is not None for weight in weights):
        return (lambda weight: weight.norm), "‖ΔW‖"
    return _median_angle, "median |angle| of the pairs, rad"


def _median_angle(weight: WeightMovement) -> float | None:
    return None if weight.turning is None else weight.turning.angle[0.5]


def _rows_of(weights: Sequence[WeightMovement]) -> tuple[list[int | None], list[str], list[str]]:
    """Numbers of layers, None last for what lies in none; what the weights are in their layer; and the same, shortened."""
    places = [place_of(weight.name) for weight in weights]
    inside = sorted({role for layer, role in places if layer is not None})
    outside = sorted({role for layer, role in places if layer is None})
    layers: list[int | None] = [*sorted({layer for layer, _ in places if layer is not None})]
    return layers + ([None] if outside else []), inside + outside, _shortened(inside) + outside


def _layer_names(layers: Sequence[int | None]) -> list[str]:
    return ["none" if layer is None else str(layer) for layer in layers]


def _log(axes: Any) -> None:
    """A logarithmic axis with plain numbers, at 1, 2 and 5 where it is short."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    named = "125" if high / low < 1_000 else "1"

    def name(value: float, place: object) -> str:
        return f"{value:g}" if value > 0 and f"{value:e}"[0] in named else ""

    axes.yaxis.set_major_formatter(name)
    axes.yaxis.set_minor_formatter(name)
    axes.tick_params(axis="y", which="minor", labelsize=8, length=0)


def _bars(
    weights: Sequence[WeightMovement],
    measure: Callable[[WeightMovement], float | None],
    title: str,
    path: Destination,
    kind: str | None,
) -> bytes:
    shown = [weight for weight in weights if measure(weight) is not None][:_BARS]
    figure = new_figure(7.5, 0.8 + 0.26 * len(shown))
    axes = figure.subplots()
    values = [measure(weight) or 0.0 for weight in shown]
    bars = axes.barh(range(len(shown)), values, color=COLORS[0])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(shown)), [weight.name for weight in shown], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    finish(axes, title)
    axes.grid(False, axis="y")
    return finished(figure, path, kind)


def _write_numbers(axes: Any, grid: np.ndarray, greatest: float) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "white" if value > 0.6 * greatest else "#1d2733"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)


def _shortened(roles: list[str]) -> list[str]:
    """Without what all begin with, in whole pieces."""
    pieces = [role.split(".") for role in roles]
    shared = 0
    while all(len(own) > shared + 1 for own in pieces) and len({own[shared] for own in pieces}) == 1:
        shared += 1
    return [".".join(own[shared:]) for own in pieces]
