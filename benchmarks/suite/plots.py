"""Plots of one task: score against trained parameters and against the measured cost of a step, and a step's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.suite.cost import Cost, read_costs
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
    figure, panels = pyplot.subplots(
        1, 3 if costly else 1, figsize=(21 if costly else 8, 7.5), squeeze=False, layout="constrained"
    )
    colors = dict(zip(groups, map(pyplot.get_cmap("tab10"), range(10)), strict=False))
    first = panels[0][0]
    _scatter(first, groups, colors, lambda summary, cost: summary.trained)
    first.set(xscale="log", xlabel="trained parameters", ylabel=f"{task}: {points[0][1].metric} on the test split")
    first.legend(fontsize=8)
    if costly:
        _scatter(panels[0][1], groups, colors, lambda summary, cost: cost["ratio"]["median"] if cost else None)
        panels[0][1].set(xlabel="time of a training step over the frozen model's")
        _bars(panels[0][2], groups, colors)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)
    pyplot.close(figure)
    return True


def _points(suite: Suite, task: str, root: Path) -> dict[str, list[Point]]:
    costs = read_costs(suite.name)
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
    # Names beside the panel, in the order of the scores, each with a line to its point: at the points they would cover each other.
    low, high = axes.get_ylim()
    heights = [low + (high - low) * (number + 0.5) / len(placed) for number in range(len(placed))]
    for height, (y, x, name, color) in zip(heights, sorted(placed, key=lambda point: point[0]), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.02, (height - low) / (high - low)),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.4, "alpha": 0.6},
        )


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
