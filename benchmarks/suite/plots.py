"""Plots of one task: score against trained parameters and against the measured cost of a step, and a step's memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite.cost import Cost, method_costs
from benchmarks.suite.store import RUNS
from benchmarks.suite.suite import Suite
from benchmarks.suite.summary import Summary, summarize

__all__ = ["plot_task"]

Point = tuple[str, Summary, Cost | None]
"""A method's name, what is known of it, and what a step costs, where that was measured."""


def plot_task(suite: Suite, task: str, target: Path, root: Path = RUNS) -> bool:
    """Draw what is known of a task to `target` (.png or .svg), each method once; False where nothing is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _points(suite, task, root)
    if not groups:
        return False
    points = [point for group in groups.values() for point in group]
    costly = any(cost for *_, cost in points)
    height = max(6.0, 0.19 * len(points) + 1.5)
    figure, panels = pyplot.subplots(
        1, 3 if costly else 1, figsize=(22 if costly else 9, height), squeeze=False, layout="constrained"
    )
    colors = dict(zip(groups, map(pyplot.get_cmap("tab10"), range(10)), strict=False))
    first = panels[0][0]
    _scatter(first, groups, colors, lambda summary, cost: summary.trained)
    first.set(xscale="log", xlabel="trained parameters", ylabel=f"{task}: {points[0][1].metric} on the test split")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper left", ncols=len(groups), fontsize=8)
    if costly:
        _scatter(panels[0][1], groups, colors, lambda summary, cost: cost["ratio"]["median"] if cost else None)
        panels[0][1].set(xlabel="time of a training step over the frozen model's")
        _bars(panels[0][2], groups, colors)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)
    pyplot.close(figure)
    return True


def _points(suite: Suite, task: str, root: Path) -> dict[str, list[Point]]:
    costs = method_costs(suite.name)
    groups: dict[str, list[Point]] = {}
    for group, name, fields in suite.methods():
        cell = suite.cell(task, fields)
        if summary := summarize(cell, root):
            groups.setdefault(group, []).append((name, summary, costs.get(cell.slug)))
    return groups


def _scatter(
    axes: Any,
    groups: Mapping[str, list[Point]],
    colors: Mapping[str, Any],
    place: Callable[[Summary, Cost | None], float | None],
) -> None:
    placed = []
    for group, points in groups.items():
        known = [(x, summary, name) for name, summary, cost in points if (x := place(summary, cost)) is not None]
        if known:
            axes.errorbar(
                [x for x, *_ in known],
                [summary.mean for _, summary, _ in known],
                yerr=[summary.deviation or 0.0 for _, summary, _ in known],
                fmt="o",
                color=colors[group],
                label=group,
                alpha=0.8,
                capsize=2,
            )
            placed += [(summary.mean, x, name, colors[group]) for x, summary, name in known]
    if not placed:
        return
    placed.sort(key=lambda point: point[0])
    low, high = _leave_out_the_far_ones(axes, [score for score, *_ in placed])
    # Names beside the panel, each with a line to its point: at the points they would cover each other.
    heights = _apart([(min(max(score, low), high) - low) / (high - low) for score, *_ in placed])
    for height, (score, x, name, color) in zip(heights, placed, strict=True):
        inside = low <= score <= high
        axes.annotate(
            name if inside else f"{name}: {score:.1f}, not shown",
            (x, min(max(score, low), high)),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=color,
            # To the text's left end, not its middle.
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.4, "alpha": 0.6, "relpos": (0.0, 0.5)},
        )


def _leave_out_the_far_ones(axes: Any, scores: Sequence[float]) -> tuple[float, float]:
    """Cut the axis at Tukey's outer fences: one method that learned nothing would press all others into one line."""
    low, high = axes.get_ylim()
    first, _, third = statistics.quantiles(scores, n=4, method="inclusive") if len(scores) > 3 else (low, 0.0, high)
    reach = 3 * (third - first)
    shown = [score for score in scores if first - reach <= score <= third + reach]
    margin = 0.25 * (max(shown) - min(shown))
    if min(scores) < min(shown):
        low = min(shown) - margin
    if max(scores) > max(shown):
        high = max(shown) + margin
    axes.set_ylim(low, high)
    return low, high


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights nearest to `heights`, which ascend, that leave room for a line of text between any two."""
    from sklearn.isotonic import isotonic_regression

    gap = min(0.03, 1 / len(heights))
    steps = [number * gap for number in range(len(heights))]
    free = isotonic_regression(
        [height - step for height, step in zip(heights, steps, strict=True)], y_min=0.0, y_max=1.0 - steps[-1]
    )
    return [float(height) + step for height, step in zip(free, steps, strict=True)]


def _bars(axes: Any, groups: Mapping[str, list[Point]], colors: Mapping[str, Any]) -> None:
    bars = [
        (name, cost["peak_bytes"] / 2**20, colors[group])
        for group, points in groups.items()
        for name, _, cost in points
        if cost
    ][::-1]
    axes.barh([name for name, _, _ in bars], [size for _, size, _ in bars], color=[color for *_, color in bars])
    axes.set(xlabel="the most that a training step allocates, MiB")
    axes.tick_params(axis="y", labelsize=7)
