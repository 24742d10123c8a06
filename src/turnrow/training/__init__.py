"""A recipe (dataclass <-> YAML) and the run it describes, on transformers' Trainer.

>>> from turnrow.training import Recipe, train
>>> result = train(Recipe.from_yaml("recipes/sst2.yaml", ["--seed", "1"]))  # doctest: +SKIP
>>> result.metrics["after"]  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turnrow.training.recipe import DataFiles, Recipe

if TYPE_CHECKING:
    from turnrow.training.interrupt import Interrupted
    from turnrow.training.planning import Plan, plan
    from turnrow.training.probing import Probe, draw_probe, probe, write_probe
    from turnrow.training.run import RunResult, train
    from turnrow.training.saved import evaluate_adapter, load_saved, predict

__all__ = [
    "DataFiles",
    "Interrupted",
    "Plan",
    "Probe",
    "Recipe",
    "RunResult",
    "draw_probe",
    "evaluate_adapter",
    "load_saved",
    "plan",
    "predict",
    "probe",
    "train",
    "write_probe",
]

# Trainer pulls in datasets and pandas; whoever only reads a recipe does not wait for them.
_LAZY = {
    "Interrupted": "turnrow.training.interrupt",
    "Plan": "turnrow.training.planning",
    "plan": "turnrow.training.planning",
    **dict.fromkeys(("Probe", "draw_probe", "probe", "write_probe"), "turnrow.training.probing"),
    "RunResult": "turnrow.training.run",
    "train": "turnrow.training.run",
    "evaluate_adapter": "turnrow.training.saved",
    "load_saved": "turnrow.training.saved",
    "predict": "turnrow.training.saved",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
