"""The papers' own tables, marked as such, from ``benchmarks/published.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["PUBLISHED", "published_tables", "to_markdown"]

PUBLISHED = Path(__file__).parents[1] / "published.yaml"


def published_tables() -> dict[str, dict[str, Any]]:
    """By name: ``title``, ``source``, ``columns``, ``rows`` (by method) and perhaps ``notes``; figures are texts, as they are printed."""
    return yaml.load(PUBLISHED.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def to_markdown(table: dict[str, Any]) -> str:
    """One of them, under its title and source."""
    head = [f"| published | {' | '.join(table['columns'])} |", f"|---|{'--:|' * len(table['columns'])}"]
    rows = [f"| {name.strip()} | {' | '.join(values)} |" for name, values in table["rows"].items()]
    notes = f"\n\n{table['notes'].strip()}" if "notes" in table else ""
    return f"**{table['title']}** (published: {table['source']})\n\n" + "\n".join(head + rows) + notes
