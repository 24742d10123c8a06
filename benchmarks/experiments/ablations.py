"""What the ablations compare: the RoCoFT paper's table 8 (rank, against LoRA), its figure 3 (strategies), its tables 11 and 12
(single entries), and what neither paper shows: which modules, and biases trained too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ABLATIONS", "Experiment"]


@dataclass(frozen=True)
class Experiment:
    """One row of a table."""

    group: str
    name: str
    method: dict[str, Any]
    """The section ``method`` of a recipe."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other fields of the recipe."""


_ATTENTION = ["query", "key", "value", "attention.output.dense"]
_MLP = ["intermediate.dense", r"output.dense"]


def _rows(r: int, **fields: Any) -> dict[str, Any]:
    return {"name": "rocoft", "mode": "row", "r": r, **fields}


def _lora(r: int) -> dict[str, Any]:
    return {"name": "lora", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}


ABLATIONS: tuple[Experiment, ...] = (
    *(Experiment("rank", f"rows r={r}", _rows(r)) for r in (1, 2, 4, 8, 64)),
    *(Experiment("rank", f"columns r={r}", _rows(r, mode="column")) for r in (1, 4, 64)),
    *(Experiment("rank", f"rows and columns r={r}", _rows(r, mode="row+column")) for r in (1, 4)),
    *(Experiment("rank", f"LoRA r={r}", _lora(r)) for r in (1, 2, 4, 8, 64)),
    Experiment("rank", "RoAd1", {"name": "road", "variant": "road_1", "target_modules": "all-linear"}),
    Experiment("rank", "head only", {"name": "head"}),
    *(
        Experiment("selection", f"rows r=4, {strategy}", _rows(4, selection=strategy))
        for strategy in ("first", "random", "wanda_max", "wanda_min", "wanda_mixed", "gradient", "fisher")
    ),
    *(
        Experiment("selection", f"columns r=4, {strategy}", _rows(4, mode="column", selection=strategy))
        for strategy in ("first", "random", "wanda_max", "wanda_min", "wanda_mixed", "gradient", "fisher")
    ),
    *(
        Experiment(
            "entries",
            f"entries p={density}, random",
            {"name": "rocoft", "mode": "entry", "density": density, "selection": "random"},
        )
        for density in (0.1, 0.01)
    ),
    *(
        Experiment("modules", f"rows r=4, {name}", _rows(4, **where))
        for name, where in (
            ("attention only", {"target_modules": _ATTENTION}),
            ("MLP only", {"target_modules": _MLP, "exclude_modules": ["attention.output.dense"]}),
            ("all", {}),
        )
    ),
    *(Experiment("biases", f"rows r=4, bias={bias}", _rows(4, bias=bias)) for bias in ("none", "rocoft_only", "all")),
    *(
        Experiment(
            "reselection",
            f"rows r=4, {strategy} every 20 steps",
            _rows(4),
            {"reselection": {"every": 20, "strategy": strategy, "budget": 16}},
        )
        for strategy in ("gradient", "cycle")
    ),
)
"""Every experiment is given the same search of the learning rate."""
