"""What the ablations compare: the RoCoFT paper's table 8 (rank, against LoRA), its figure 3 (strategies), its tables 11 and 12
(single entries); and what neither paper shows: methods at equal size, on every task; rows, columns or both; more rows; which
modules, biases trained too, quantized bases, re-selection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.experiments.runs import Method

__all__ = ["ABLATIONS", "Experiment"]


@dataclass(frozen=True)
class Experiment:
    """One row of a table."""

    group: str
    name: str
    method: dict[str, Any]
    """The section ``method`` of a recipe."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields of the recipe."""

    @property
    def trains(self) -> Method:
        """What its runs are kept by: two experiments that are the same have the same runs."""
        return Method(self.method, self.fields)


_ATTENTION = ["query", "key", "value", "attention.output.dense"]
_STRATEGIES = ("random", "wanda_max", "wanda_min", "wanda_mixed", "gradient", "fisher")


def _rows(r: int, **fields: Any) -> dict[str, Any]:
    return {"name": "rocoft", "mode": "row", "r": r, **fields}


def _lora(r: int) -> dict[str, Any]:
    return {"name": "lora", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}


_ROAD1 = {"name": "road", "variant": "road_1", "target_modules": "all-linear"}

ABLATIONS: tuple[Experiment, ...] = (
    Experiment("size", "head only", {"name": "head"}),
    Experiment("size", "RoAd1", _ROAD1),
    Experiment("size", "LoRA r=1", _lora(1)),
    Experiment("size", "rows r=3", _rows(3)),
    Experiment("size", "rows r=3, gradient", _rows(3, selection="gradient")),
    Experiment("size", "rows r=3, gradient, biases", _rows(3, selection="gradient", bias="rocoft_only")),
    Experiment("shape", "rows r=3, gradient", _rows(3, selection="gradient")),
    Experiment("shape", "columns r=3, gradient", _rows(3, mode="column", selection="gradient")),
    Experiment("shape", "rows and columns r=1, gradient", _rows(1, mode="row+column", selection="gradient")),
    Experiment("larger", "LoRA r=8", _lora(8)),
    Experiment("larger", "rows r=16, gradient, biases", _rows(16, selection="gradient", bias="rocoft_only")),
    *(Experiment("rank", f"rows r={r}", _rows(r)) for r in (1, 2, 4, 8, 64)),
    *(Experiment("rank", f"columns r={r}", _rows(r, mode="column")) for r in (1, 4, 64)),
    *(Experiment("rank", f"LoRA r={r}", _lora(r)) for r in (1, 2, 4, 8, 64)),
    Experiment("selection", "rows r=4, first", _rows(4)),
    *(Experiment("selection", f"rows r=4, {name}", _rows(4, selection=name)) for name in _STRATEGIES),
    Experiment("selection", "columns r=4, first", _rows(4, mode="column")),
    *(
        Experiment("selection", f"columns r=4, {name}", _rows(4, mode="column", selection=name))
        for name in ("random", "wanda_max", "gradient")
    ),
    *(
        Experiment(
            "entries",
            f"entries p={density}, random",
            {"name": "rocoft", "mode": "entry", "density": density, "selection": "random"},
        )
        for density in (0.1, 0.01)
    ),
    Experiment("modules", "rows r=4, all", _rows(4)),
    Experiment("modules", "rows r=4, attention only", _rows(4, target_modules=_ATTENTION)),
    Experiment(
        "modules",
        "rows r=4, MLP only",
        _rows(4, target_modules=["intermediate.dense", "output.dense"], exclude_modules=["attention.output.dense"]),
    ),
    Experiment("biases", "rows r=4, none", _rows(4)),
    Experiment("biases", "rows r=4, of the adapted modules", _rows(4, bias="rocoft_only")),
    Experiment("biases", "rows r=4, all", _rows(4, bias="all")),
    Experiment("quantized", "rows r=3, float32", _rows(3)),
    *(
        Experiment("quantized", f"rows r=3, {kind}", _rows(3), {"quantization": kind})
        for kind in ("nf4", "int8", "torchao_int8", "torchao_int4")
    ),
    Experiment("quantized", "RoAd1, nf4", _ROAD1, {"quantization": "nf4"}),
    Experiment("reselection", "rows r=3, never", _rows(3, selection="gradient")),
    *(
        Experiment(
            "reselection",
            f"rows r=1 and one more each 40 steps to r=3, {strategy}",
            _rows(1, selection="gradient"),
            {"reselection": {"every": 40, "strategy": strategy, "budget": 3}},
        )
        for strategy in ("gradient", "cycle")
    ),
)
"""Every experiment is given the same search of the learning rate."""
