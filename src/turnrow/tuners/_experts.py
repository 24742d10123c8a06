"""Which fused weights of experts an adapter is for: resolved and checked before the model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from turnrow.errors import UserError, near_matches
from turnrow.ops.experts import FusedWeight
from turnrow.tuners._walk import find_experts, find_named, find_other_experts

__all__ = ["resolve_experts", "warn_of_untargeted_experts"]


def resolve_experts(tuner: BaseTuner, config: Any, model: nn.Module, *, all_layers: bool) -> dict[str, FusedWeight]:
    """Find the fused weights that `config` targets in `model`, by the name of the parameter.

    Replaces a `target_parameters` of None by the names it stands for, so that the adapter means the same when it is loaded:
    all of them with `all_layers`, otherwise none, with a warning.

    Args:
        tuner: whose rules for excluded modules and numbers of layers apply.
        config: with `target_parameters`, changed in place.
        model: with or without adapters.
        all_layers: whether the config asks for every layer of the model, instead of naming them.

    Raises:
        UserError: a name matches no fused weight (every such name is explained).
    """
    found = find_experts(model)
    wanted = config.target_parameters
    if wanted is None:
        if not all_layers:
            warn_of_untargeted_experts(
                model, "name them in target_parameters, or pass target_parameters=[] if that is meant"
            )
            config.target_parameters = [] if found else None
            return {}
        chosen = {name: fused for name, fused in found.items() if _is_in_scope(tuner, config, name)}
        _warn_of_other_experts(model)
        config.target_parameters = _short_names(chosen, found) if found else None
        return chosen
    unmatched = [key for key in wanted if not find_named(key, found)]
    if unmatched:
        reasons = ", ".join(_why_unmatched(key, model, found) for key in unmatched)
        raise UserError(f"target_parameters match no fused weight of experts: {reasons}")
    named = {name for key in wanted for name in find_named(key, found)}
    chosen = {name: found[name] for name in found if name in named and _is_in_scope(tuner, config, name)}
    if wanted and not chosen:
        raise UserError(
            f"target_parameters {sorted(wanted)} leave nothing to adapt: exclude_modules or modules_to_save take them out, or "
            f"layers_to_transform {config.layers_to_transform} names no layer of the model"
        )
    return chosen


def warn_of_untargeted_experts(model: nn.Module, advice: str) -> None:
    """Say which experts an adapter leaves as they are, if the model has any that are fused; `advice` says what to do."""
    found = list(find_experts(model))
    if found:
        warnings.warn(
            f"the experts of this model are not trained: they are fused parameters, {_first_of(found)}, which target_modules "
            f"does not reach; {advice}",
            stacklevel=2,
        )
    _warn_of_other_experts(model)


def _warn_of_other_experts(model: nn.Module) -> None:
    others = find_other_experts(model)
    if others:
        kind = type(next(iter(others.values()))).__name__
        warnings.warn(
            f"the experts in {_first_of(list(others))} are not trained: a {kind} holds them quantized, or in a way that turnrow "
            "does not know",
            stacklevel=2,
        )


def _is_in_scope(tuner: BaseTuner, config: Any, name: str) -> bool:
    """Whether the layer numbers allow a parameter, and nothing excludes it or the module that holds it."""
    scope: Any = SimpleNamespace(
        target_modules={name.partition(".")[2]},  # a whole name would skip the check of its layer
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    verdict: Any = tuner._check_target_module_exists(scope, name)
    of_module: Any = tuner._check_target_module_exists(scope, name.rpartition(".")[0])
    return not isinstance(verdict, _ExcludedModule) and not isinstance(of_module, _ExcludedModule) and bool(verdict)


def _short_names(chosen: Collection[str], found: Collection[str]) -> list[str]:
    """Names for the config: the last two parts, such as 'experts.down_proj', if they mean the same parameters."""
    short = sorted({".".join(name.split(".")[-2:]) for name in chosen})
    meant = {name for key in short for name in find_named(key, found)}
    return short if meant == set(chosen) else sorted(chosen)


def _why_unmatched(key: str, model: nn.Module, found: Collection[str]) -> str:
    parameters = dict(model.named_parameters())
    same = find_named(key, parameters)
    if same:
        parameter = parameters[same[0]]
        dtype = str(parameter.dtype).removeprefix("torch.")
        hint = ", its module belongs into target_modules" if parameter.dim() == 2 else ""
        return (
            f"{key!r} is of shape {list(parameter.shape)} and {dtype} in a {type(_holder(model, same[0])).__name__}, and must be "
            f"of three dimensions, floating-point, and stored in a known order{hint}"
        )
    ends = {end for name in found for end in (name, ".".join(name.split(".")[-2:]), name.rpartition(".")[2])}
    hint = near_matches(key, ends)
    return f"{key!r}{hint}" if found else f"{key!r} (the model has no fused experts)"


def _holder(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _first_of(names: list[str]) -> str:
    return f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
