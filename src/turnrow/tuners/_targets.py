"""Which modules an adapter is for: resolved and checked before the model is touched.

peft ignores a pattern that matches nothing as long as another one matches, and notices a module it cannot adapt when it
has already replaced others. Here everything is found out first, so that an error leaves the model as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from turnrow.errors import UserError, near_matches
from turnrow.ops.experts import fused_weights
from turnrow.tuners._dense import dense_linear
from turnrow.tuners._walk import find_experts, find_named, modules_outside_adapters

__all__ = ["covers_all_layers", "resolve_targets"]


def resolve_targets(tuner: BaseTuner, config: Any, model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that `config` targets in `model`, by name.

    Replaces 'all-linear' in the config by the names it stands for, as peft does later, so that layer numbers apply to
    them too.

    Raises:
        UserError: a pattern matches nothing (every such pattern is named, with near matches).
    """
    if config.target_modules == DUMMY_TARGET_MODULES:
        return {}
    if not config.target_modules and getattr(config, "target_parameters", None):
        return {}  # the experts alone
    chosen_by_us = covers_all_layers(config)
    _maybe_include_all_linear_layers(config, model)
    if chosen_by_us:
        config.target_modules = {n for n in config.target_modules if not _is_gate_beside_experts(n, model)}
        if getattr(config, "layers_to_transform", None) is not None:
            config.target_modules = _in_layers(config)
    modules = dict(modules_outside_adapters(model))
    matched: dict[str, nn.Module] = {}
    excluded: set[str] = set()
    for name, module in modules.items():
        found: Any = tuner._check_target_module_exists(config, name)
        if isinstance(found, _ExcludedModule):
            excluded.add(name)
        elif found:
            matched[name] = module
    unmatched = _unmatched_patterns(config.target_modules, matched.keys() | excluded)
    if unmatched or not matched:
        raise UserError(_explain(config, unmatched, modules, excluded, find_experts(model)))
    return matched


def covers_all_layers(config: Any) -> bool:
    """Whether `config` asks for every linear layer instead of naming some; to be asked before `resolve_targets`."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _is_gate_beside_experts(name: str, model: nn.Module) -> bool:
    """Whether a linear layer is no matrix to adapt, but the gate of a shared expert, with one output feature, or a router.

    A router that is a subclass of torch.nn.Linear returns more than a product (Llama 4).
    """
    layer = dense_linear(model.get_submodule(name))
    is_router = isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward
    if layer is None or not (is_router or 1 in layer.weight.shape):
        return False
    beside = model.get_submodule(name.rpartition(".")[0]).children()
    return any(fused_weights(m.get_base_layer() if isinstance(m, BaseTunerLayer) else m) for m in beside)


def _unmatched_patterns(patterns: str | Iterable[str], hit: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        return []  # one regular expression: nothing matched at all, or it did its work
    hit = list(hit)
    return sorted(p for p in patterns if not find_named(p, hit))


def _in_layers(config: Any) -> set[str]:
    """Those of the target names that lie in the layers asked for."""
    numbers = config.layers_to_transform
    numbers = {numbers} if isinstance(numbers, int) else set(numbers)
    patterns = config.layers_pattern or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [re.compile(rf"(?:^|.*?\.){p}\.(\d+)\.") for p in patterns]
    inside = set()
    for name in config.target_modules:
        found = [m for e in expressions if (m := e.match(name))]
        if found and int(found[0].group(1)) in numbers:
            inside.add(name)
    if not inside:
        raise UserError(
            f"layers_to_transform is {config.layers_to_transform}, but no linear module lies in such a layer; "
            f"layers_pattern is {config.layers_pattern!r}"
        )
    return inside


def _explain(config: Any, unmatched: list[str], modules: dict, excluded: set[str], experts: Iterable[str]) -> str:
    if isinstance(config.target_modules, str):
        return (
            f"target_modules {config.target_modules!r}, read as one regular expression, matches no whole module name; "
            f"a name looks like {_example(modules)!r}"
        )
    if not unmatched:
        return (
            f"target_modules {sorted(config.target_modules)} leave nothing to adapt: exclude_modules or modules_to_save "
            f"take out {sorted(excluded)[:3]}, or layers_to_transform {getattr(config, 'layers_to_transform', None)} "
            "names no layer of the model"
        )
    last_parts = {part for name in modules for part in (name, name.rpartition(".")[2])}
    named = []
    for pattern in unmatched:
        if find_named(pattern, modules):
            named.append(f"{pattern!r} (in no layer of layers_to_transform)")
        elif find_named(pattern, experts):
            named.append(f"{pattern!r} (fused weights of experts: name them in target_parameters)")
        else:
            named.append(f"{pattern!r}{near_matches(pattern, last_parts)}")
    return f"target_modules match no module of the model: {', '.join(named)}. A name looks like {_example(modules)!r}"


def _example(modules: dict[str, nn.Module]) -> str:
    return next((n for n, m in modules.items() if dense_linear(m) is not None), next(iter(modules), ""))
