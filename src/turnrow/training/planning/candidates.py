"""The methods that a plan compares: the recipe's own, its siblings, LoRA and full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from turnrow.training.methods import method_config

__all__ = ["LORA_RANK", "candidates"]

LORA_RANK = 8

# Which modules are adapted is the recipe's choice for every method that can take it.
_SHARED = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


def candidates(method: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `method` sections to compare, the given one first, none twice.

    RoCoFT's rows and columns take the same whichever they are, so beside rows there are no other rows.
    """
    shared = {name: method[name] for name in _SHARED if method.get(name) is not None}
    everywhere = {"target_modules": "all-linear", **shared}
    rank = {"r": method["r"]} if method["name"] == "rocoft" and "r" in method else {}
    # Neither counts nor bytes depend on the size of the groups; pairs of neighbours fit every even number of features.
    group = {"group_size": method.get("group_size", 64) if method["name"] == "road" else 2}
    others: list[dict[str, Any]] = [
        {"name": "rocoft", "mode": "row", **rank, **shared},
        {"name": "rocoft", "mode": "column", **rank, **shared},
        {"name": "road", "variant": "road_1", **group, **everywhere},
        {"name": "lora", "r": LORA_RANK, **everywhere},
        {"name": "full"},
    ]
    chosen = [dict(method)]
    for other in map(_without_unknown, others):
        if all(_kind(other) != _kind(known) for known in chosen):
            chosen.append(other)
    return chosen


def _without_unknown(method: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the config of the method has no field for."""
    config = method_config({"name": method["name"]})
    known = {"name", *(field.name for field in fields(config))} if config is not None else {"name"}
    return {name: value for name, value in method.items() if name in known}


def _kind(method: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two methods have in common of which one is enough."""
    config: Any = method_config(method)
    if method["name"] == "rocoft":
        return ("rocoft", config.mode)
    return (method["name"], None if config is None else config.to_dict())
