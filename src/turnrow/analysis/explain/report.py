"""What an adapter changed on one page: a single HTML file that needs nothing else."""

from __future__ import annotations

import os

import torch

from turnrow.analysis.displacement.plots import draw_displacement, draw_tokens
from turnrow.analysis.explain import plots
from turnrow.analysis.explain.explanation import Explanation
from turnrow.analysis.pages import write_page

__all__ = ["write_report"]


def write_report(
    path: str | os.PathLike[str], found: Explanation, *, title: str = "What changed, and where", subtitle: str = ""
) -> None:
    """Write the page, its pictures inside.

    Args:
        path: the file, replaced atomically.
        found: what was measured; something must have changed.
        title, subtitle: shown on top.
    """
    pictures = {"weights": plots.draw_weights(found)}
    if any(len(weight.singular_values) > 1 for weight in found.weights):
        pictures["spectra"] = plots.draw_spectra(found)
    if found.turning is not None:
        pictures["turning"] = plots.draw_turning(found)
    if any(weight.parts for weight in found.weights):
        pictures["parts"] = plots.draw_parts(found)
    if found.displacement is not None:
        pictures["displacement"] = draw_displacement(found.displacement)
    for number, text in enumerate(found.texts):
        pictures[f"text {number}"] = draw_tokens(
            torch.tensor(text.turn), text.layers, text.tokens, title=f"Text {number + 1}: 1 − cos(x, x0)"
        )
    values = {"title": title, "subtitle": subtitle, "found": found, "layers": _layers(found)}
    write_page(path, "analysis/explain/report.html.j2", values, pictures)


def _layers(found: Explanation) -> list[dict[str, str]]:
    if found.displacement is None:
        return []
    return [
        {
            "layer": layer,
            **{
                f"{kind} {measure}": f"{getattr(kinds[kind], measure).median:.3g}" if kind in kinds else ""
                for kind in ("first", "content", "last")
                for measure in ("magnitude", "turn")
            },
        }
        for layer, kinds in found.displacement.layers.items()
    ]
