"""Plots of one task: score against trained parameters and against step time, and peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.suite.store import RUNS
from benchmarks.suite.suite import Suite
from benchmarks.suite.summary import Summary, summarize

__all__ = ["plot_task"]


def plot_task(suite: Suite, task: str, target: Path, root: Path = RUNS) -> bool:
    """Draw what is known of a task to `target` (.png or .svg); False where nothing is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {
        group: {
            name: summary for name, fields in methods.items() if (summary := summarize(suite.cell(task, fields), root))
        }
        for group, methods in suite.groups.items()
    }
    found = {group: methods for group, methods in found.items() if methods}
    if not found:
        return False
    memory = any(summary.peak_memory for methods in found.values() for summary in methods.values())
    figure, panels = pyplot.subplots(1, 3 if memory else 2, figsize=(19 if memory else 13, 6.5), layout="constrained")
    colors = pyplot.get_cmap("tab10")
    for number, (group, methods) in enumerate(found.items()):
        for axes, across in ((panels[0], "trained"), (panels[1], "seconds_per_step")):
            _points(axes, methods, across, group, colors(number % 10))
    metric = next(iter(next(iter(found.values())).values())).metric
    panels[0].set(xscale="log", xlabel="trained parameters", ylabel=f"{task}: {metric} on the test split")
    panels[1].set(xlabel="seconds a step (median; not a benchmark)")
    panels[0].legend(fontsize=8)
    if memory:
        _bars(panels[2], found, colors)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=90)
    pyplot.close(figure)
    return True


def _points(axes: Any, methods: dict[str, Summary], across: str, group: str, color: Any) -> None:
    xs = [getattr(summary, across) for summary in methods.values()]
    ys = [summary.mean for summary in methods.values()]
    errors = [summary.deviation or 0.0 for summary in methods.values()]
    axes.errorbar(xs, ys, yerr=errors, fmt="o", color=color, label=group, alpha=0.8, capsize=2)
    for x, y, name in zip(xs, ys, methods, strict=True):
        axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6.5)


def _bars(axes: Any, found: dict[str, dict[str, Summary]], colors: Any) -> None:
    bars = [
        (name, summary.peak_memory / 2**20, colors(number % 10))
        for number, methods in enumerate(found.values())
        for name, summary in methods.items()
        if summary.peak_memory
    ][::-1]
    axes.barh([name for name, _, _ in bars], [size for _, size, _ in bars], color=[color for *_, color in bars])
    axes.set(xlabel="peak memory of the process, MiB")
    axes.tick_params(axis="y", labelsize=7)
