"""The run on one page: a single HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turnrow.analysis.pages import write_page
from turnrow.training.recipe import Recipe
from turnrow.training.sizes import readable_bytes

__all__ = ["write_report"]

_SHOWN = 12


def write_report(
    path: Path, curve: Path, recipe: Recipe, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write the page, with the picture inside.

    Args:
        path: the file, replaced atomically.
        curve: the PNG to show.
        recipe: shown in full.
        metrics: as in ``metrics.json``.
        rows: predictions on the test split, of which a few are shown.
    """
    label = recipe.task.get("label")
    values = {
        "title": f"{metrics['method']} · {metrics['task']}",
        "m": metrics,
        "recipe": recipe,
        "recipe_yaml": recipe.to_yaml(),
        "columns": list(rows[0]) if rows else [],
        "rows": _worth_showing(rows, label),
        "total": len(rows),
        "wrong": sum(_wrong(row, label) for row in rows) if label else None,
        "is_wrong": lambda row: _wrong(row, label),
    }
    filters = {"figure": _figure, "bytes": readable_bytes, "seconds": _seconds}
    write_page(path, "training/report.html.j2", values, {"curve": curve.read_bytes()}, filters)


def _wrong(row: Mapping[str, Any], label: str | None) -> bool:
    # A number predicted for a number is neither right nor wrong.
    if label is None or label not in row or isinstance(row.get("prediction"), float):
        return False
    # As text, as the classification task compares them.
    return str(row[label]) != str(row.get("prediction"))


def _worth_showing(rows: Sequence[Mapping[str, Any]], label: str | None) -> list[Mapping[str, Any]]:
    """Half mistakes, half not, each the first of their kind: what a reader wants to see."""
    wrong = [row for row in rows if _wrong(row, label)][: _SHOWN // 2]
    return wrong + [row for row in rows if not _wrong(row, label)][: _SHOWN - len(wrong)]


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
