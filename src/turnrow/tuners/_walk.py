"""Names of modules and of fused weights in a model that may carry adapters already."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from turnrow.ops.experts import FusedWeight, fused_weights, holds_other_experts

__all__ = ["find_experts", "find_named", "find_other_experts", "modules_outside_adapters"]


def modules_outside_adapters(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """All named modules but those inside adapter layers that are already there."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
        if name:
            yield name, module


def find_experts(model: nn.Module) -> dict[str, FusedWeight]:
    """The fused weights of experts in `model` by the names of the parameters, without what adapters put into those."""
    return {
        f"{name}.{parameter}": fused
        for name, module in _expert_modules(model)
        for parameter, fused in fused_weights(module).items()
    }


def find_other_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold experts of a kind that cannot be adapted, such as quantized ones."""
    return {name: module for name, module in _expert_modules(model) if holds_other_experts(module)}


def find_named(key: str, names: Iterable[str]) -> list[str]:
    """The names that are `key` or end in `.key`."""
    return [name for name in names if name == key or name.endswith(f".{key}")]


def _expert_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules under whatever adapters, without the copies that peft keeps of modules trained whole."""
    copies: tuple[str, ...] = ()
    for name, module in modules_outside_adapters(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = (*copies, f"{name}.")
        elif not name.startswith(copies):
            yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
