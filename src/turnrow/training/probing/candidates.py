"""The methods that a probe compares: the recipe's own, and those that a user would try beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from turnrow.errors import UserError
from turnrow.training.methods import check_method, has_biases, method_config

__all__ = ["probe_candidates"]


def probe_candidates(method: Mapping[str, Any], base: nn.Module) -> list[dict[str, Any]]:
    """The `method` sections to compare by default, the given one first, none twice.

    RoAd 4 starts with the kernel of RoAd 2, so the two cannot be told apart before training and one stands for both. Methods that
    the installed peft has no targets for in this model are left out, and those of biases or norms where it has none.

    Args:
        method: of the recipe.
        base: the base model.
    """
    everywhere = {"target_modules": "all-linear"}
    norms = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if _is_norm(module)})
    others: list[dict[str, Any]] = [
        {"name": "full"},
        {"name": "rocoft", "mode": "row", "r": 1},
        {"name": "rocoft", "mode": "row", "r": 3},
        {"name": "rocoft", "mode": "row", "r": 1, "selection": "gradient"},
        {"name": "rocoft", "mode": "column", "r": 1},
        {"name": "rocoft", "mode": "column", "r": 3},
        {"name": "rocoft", "mode": "column", "r": 1, "selection": "wanda_max"},
        {"name": "rocoft", "mode": "row+column", "r": 1},
        {"name": "road", "variant": "road_1", "group_size": 2, **everywhere},
        {"name": "road", "variant": "road_2", "group_size": 2, **everywhere},
        {"name": "lora", "r": 1, "lora_alpha": 2, **everywhere},
        {"name": "lora", "r": 8, "lora_alpha": 16, **everywhere},
        {"name": "ia3"},
        *([{"name": "bitfit"}] if has_biases(base) else []),
        *([{"name": "ln_tuning", "target_modules": norms}] if norms else []),
    ]
    chosen, known = [dict(method)], [_kind(method)]
    for other in others:
        try:
            checked = check_method(other)
        except UserError:  # this peft has no such method
            continue
        if (kind := _kind(checked)) not in known:
            chosen.append(checked)
            known.append(kind)
    return chosen


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.parameters(recurse=False), None) is not None


def _kind(method: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two methods have in common of which one is enough."""
    config: Any = method_config(method)
    if config is None:
        return (method["name"],)
    if method["name"] == "road":
        # The kernel is the same for every pairing of features as far as advice goes, and the counts are.
        return (method["name"], config.variant)
    return (method["name"], config.to_dict())
