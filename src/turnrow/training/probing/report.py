"""A probe as a picture and as one HTML page."""

from __future__ import annotations

import os
import statistics

from turnrow.analysis.pages import write_page
from turnrow.analysis.pictures import COLORS, Destination, finish, finished, new_figure
from turnrow.errors import UserError
from turnrow.training.probing.figures import Probe
from turnrow.training.sizes import readable_bytes

__all__ = ["draw_probe", "write_probe"]


def draw_probe(probe: Probe, path: Destination = None, *, kind: str | None = None) -> bytes:
    """Expected score with its spread over the draws, and distance to the kernel of full fine-tuning, a line a method.

    Args:
        probe: what is drawn; methods without a kernel are left out.
        path: a file ending in .png or .svg, replaced atomically.
        kind: "png" (default) or "svg", where there is no path.
    """
    shown = [one for one in probe.methods if one.scores][::-1]
    if not shown:
        raise UserError("no method of the probe has a score, so there is nothing to draw; their notes say why")
    figure = new_figure(11, 1.6 + 0.32 * len(shown))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(shown))
    spreads = [one.spread or 0.0 for one in shown]
    scores = [one.score for one in shown]
    left.errorbar(scores, places, xerr=spreads, fmt="o", color=COLORS[0], ecolor=COLORS[5], elinewidth=1.2, capsize=3)
    for place, one in enumerate(shown):
        left.plot(one.scores, [place] * len(one.scores), ".", color=COLORS[5], alpha=0.5, markersize=4)
    left.axvline(
        statistics.fmean(probe.start_scores), color=COLORS[3], linestyle="--", linewidth=1.2, label="before training"
    )
    left.set_yticks(places, [one.title for one in shown])
    left.set_xlabel(f"{probe.metric} on held-out rows", fontsize=9)
    left.legend(loc="best", fontsize=8, frameon=False)
    finish(left, "Expected score")
    for p, color, shift in ((1, COLORS[2], 0.17), (2, COLORS[1], -0.17)):
        right.barh(
            [place + shift for place in places],
            [one.distance(p) or 0.0 for one in shown],
            0.32,
            color=color,
            label=f"p = {p}",
        )
    right.set_xlim(0)
    right.legend(loc="best", fontsize=8, frameon=False)
    finish(right, "Distance to the kernel of full fine-tuning")
    return finished(figure, path, kind)


def write_probe(path: str | os.PathLike[str], probe: Probe) -> None:
    """Write the page, its picture inside; the file is replaced atomically."""
    rows = [
        {
            "title": one.title,
            "score": _or_dash(one.score, "{:.3f}"),
            "spread": _or_dash(one.spread, "± {:.3f}", ""),
            "near": _or_dash(one.distance(1), "{:.2f}"),
            "far": _or_dash(one.distance(2), "{:.2f}"),
            "parameters": _or_dash(one.trainable_parameters, "{:,}"),
            "seconds": _or_dash(one.step_seconds, "{:.3g} s"),
            "memory": "–" if one.peak_bytes is None else readable_bytes(one.peak_bytes),
            "note": one.note,
        }
        for one in probe.methods
    ]
    pictures = {"probe": draw_probe(probe)} if any(one.scores for one in probe.methods) else {}
    values = {
        "title": "Which method will do",
        "probe": probe,
        "rows": rows,
        "start": statistics.fmean(probe.start_scores),
    }
    write_page(path, "training/probing/report.html.j2", values, pictures)


def _or_dash(value: float | None, form: str, otherwise: str = "–") -> str:
    return otherwise if value is None else form.format(value)
