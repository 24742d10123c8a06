"""Runs on disk: ``results/runs/SETTINGS/TASK/METHOD/RATE-SEED.json``, each file written once and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results import write
from benchmarks.suite.suite import Cell

__all__ = ["FORMAT", "RUNS", "Store"]

FORMAT = 3
RUNS = Path(__file__).parents[1] / "results" / "runs"


class Store:
    """The runs of one cell."""

    def __init__(self, cell: Cell, root: Path = RUNS) -> None:
        self.cell = cell
        self.folder = root / cell.settings / cell.task / cell.slug

    def path(self, rate: float, seed: int) -> Path:
        """Where the run at a learning rate and a seed lies."""
        return self.folder / f"{rate:g}-{seed}.json"

    def find(self, rate: float, seed: int) -> dict[str, Any] | None:
        """The run at a learning rate and a seed, if there is one."""
        path = self.path(rate, seed)
        return json.loads(path.read_text()) if path.exists() else None

    def runs(self) -> list[dict[str, Any]]:
        """All that are there."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run, in place of a former one at its learning rate and seed."""
        whole = {
            "format": FORMAT,
            "settings": self.cell.settings,
            "task": self.cell.task,
            "fields": self.cell.fields,
            "training_rows": self.cell.training_rows,
            **run,
        }
        write(whole, self.path(run["learning_rate"], run["seed"]))
