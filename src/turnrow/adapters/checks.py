"""Do the tensors of an adapter fit its configuration, and the model they are to be put on?

peft ignores what it does not expect in an adapter file and leaves at its initial value what it does not find;
for RoCoFT and RoAd every such case is an error here. The files of other methods are left to peft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.fingerprint import WeightPrint, fingerprint, named_weights, weight_shape
from turnrow.adapters.folder import KEY_PREFIX, WEIGHTS_NAME
from turnrow.adapters.numbers import is_count
from turnrow.adapters.road_blocks import own_places
from turnrow.adapters.rocoft_checks import BIAS, check_rocoft, describe
from turnrow.errors import AdapterError, UserError, near_matches
from turnrow.ops.experts import FusedWeight

__all__ = [
    "base_difference",
    "check_against_config",
    "check_against_model",
    "check_against_weights",
    "check_base",
    "check_finite",
    "compare_prints",
]

_ROAD_NAMES = {"road_theta", "road_alpha"}
# parameters per output feature
_ROAD_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def check_against_config(adapter: AdapterFile) -> None:
    """Check the tensors of a RoCoFT or RoAd adapter against its own configuration (and the shapes in its manifest).

    Raises:
        AdapterError: names the tensor, what it is and what the configuration asks for.
    """
    if adapter.method not in ("ROCOFT", "ROAD"):
        return
    path = adapter.path / WEIGHTS_NAME
    stray = next((key for key in adapter.tensors if not key.startswith(KEY_PREFIX)), None)
    if stray is not None:
        raise AdapterError(
            f"{path}: the tensor {stray!r} does not begin with {KEY_PREFIX!r}, as those of a peft adapter do"
        )
    if not adapter.modules:
        raise AdapterError(
            f"{path} holds no {adapter.method} tensors, only {', '.join(sorted(adapter.saved_modules)[:3])}"
        )
    _check_named(adapter)
    for module, tensors in adapter.modules.items():
        shape = adapter.base_prints[module].shape if module in adapter.base_prints else None
        check = check_rocoft if adapter.method == "ROCOFT" else _check_road
        check(f"{path}: module {module!r}", module, tensors, adapter.config, shape)


def _check_named(adapter: AdapterFile) -> None:
    """Modules that the configuration gives pairs of their own must be in the file."""
    blocks = adapter.config.get("blocks")
    if adapter.method != "ROAD" or not isinstance(blocks, dict):
        return
    for key in blocks:
        if not any(f".{module}".endswith(f".{key}") for module in adapter.modules):
            raise AdapterError(
                f"{adapter.path}: the configuration's blocks name {key!r}, of which the file has no tensors"
                f"{near_matches(key, adapter.modules)}"
            )


def check_finite(adapter: AdapterFile) -> None:
    """Refuse an adapter that holds NaN or infinite values (AdapterError names the first tensor)."""
    bad = adapter.non_finite()
    if bad:
        key, count = next(iter(bad.items()))
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise AdapterError(
            f"{adapter.path / WEIGHTS_NAME}: {key}{more} holds {count} NaN or infinite values of "
            f"{adapter.tensors[key].numel()}: the training diverged; use an earlier checkpoint"
        )


def check_against_model(adapter: AdapterFile, model: torch.nn.Module) -> None:
    """Check that `model` (without adapters) has every module of a RoCoFT or RoAd adapter, in the right size.

    Raises:
        AdapterError: names the first module or parameter that is missing or has another size.
    """
    if adapter.method not in ("ROCOFT", "ROAD"):
        return
    check_against_weights(adapter, named_weights(model), type(model).__name__)
    _check_saved_modules(adapter, model)


def check_against_weights(adapter: AdapterFile, named: Mapping[str, torch.nn.Module | FusedWeight], model: str) -> None:
    """As `check_against_model`, of the modules and fused weights of a base by name; `model` is the name of its class."""
    for module, tensors in adapter.modules.items():
        if module not in named:
            hint = near_matches(module, named)
            raise AdapterError(f"{_another_base(adapter)}: this {model} has no module {module!r}{hint}")
        shape = weight_shape(named[module])
        if shape is None:
            raise AdapterError(
                f"{_another_base(adapter)}: module {module!r}, a {type(named[module]).__name__}, has no weight"
            )
        check = check_rocoft if adapter.method == "ROCOFT" else _check_road
        check(f"{_another_base(adapter)}: module {module!r}", module, tensors, adapter.config, shape)
        if BIAS in tensors:
            _check_bias(f"{_another_base(adapter)}: module {module!r}", tensors[BIAS], named[module])


def check_base(adapter: AdapterFile, model: torch.nn.Module) -> None:
    """Compare the weights of `model` (without adapters) with the fingerprints in the adapter's manifest, if it has one.

    Raises:
        AdapterError: names the first module that is missing or differs beyond rounding.
    """
    named = named_weights(model)
    compare_prints(adapter, lambda module, own: fingerprint(named[module], own) if module in named else None)


def compare_prints(adapter: AdapterFile, take: Callable[[str, Mapping[str, Tensor]], WeightPrint | None]) -> None:
    """As `check_base`, where `take(module, own)` is the fingerprint of a weight of the base, None if it has no such module."""
    for module, expected in adapter.base_prints.items():
        found = take(module, adapter.modules.get(module, {}) if expected.own is None else expected.own)
        difference = "it is missing here" if found is None else expected.difference(found)
        if difference is not None:
            raise base_difference(adapter, module, difference)


def base_difference(adapter: AdapterFile, module: str, difference: str) -> AdapterError:
    """The error for a base that is not the adapter's, with the first module that differs and how."""
    return AdapterError(
        f"{_another_base(adapter)}: the first module that differs is {module!r}: {difference}. "
        "Load the model that it was trained on, or pass check_base=False (--no-check-base on the command line) to use it all the same"
    )


def _another_base(adapter: AdapterFile) -> str:
    name = f" ({adapter.base_name})" if adapter.base_name else ""
    return f"the adapter in {adapter.path} belongs to another base{name}"


def _check_bias(where: str, change: Tensor, module: Any) -> None:
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor) or bias.shape != change.shape:
        held = describe(bias) if isinstance(bias, Tensor) else "no bias"
        raise AdapterError(f"{where}: {BIAS} is {describe(change)}, the module has {held}")


def _check_road(
    where: str,
    module: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shape: tuple[int, ...] | None,
) -> None:
    variant, group = config.get("variant"), config.get("group_size")
    if not isinstance(variant, str) or variant not in _ROAD_SIZES:
        raise AdapterError(
            f"{where}: the configuration's variant is {variant!r}, allowed are {', '.join(map(repr, _ROAD_SIZES))}"
        )
    if not is_count(group) or group % 2:
        raise AdapterError(f"{where}: the configuration's group_size is {group!r}, an even number from 2 on is needed")
    if set(tensors) != _ROAD_NAMES:
        raise AdapterError(
            f"{where}: the tensors must be road_theta and road_alpha, the file has {', '.join(sorted(tensors))}"
        )
    sizes = {name: describe(tensors[name]) for name in sorted(_ROAD_NAMES)}
    if (
        any(tensor.ndim != 1 or not tensor.is_floating_point() for tensor in tensors.values())
        or len(set(sizes.values())) != 1
    ):
        raise AdapterError(
            f"{where}: road_theta and road_alpha must be floating-point vectors of one size, got {sizes}"
        )
    out = len(tensors["road_theta"]) / _ROAD_SIZES[variant]
    if out % group:
        raise AdapterError(
            f"{where}: {variant} with {sizes['road_theta']} means {out:g} output features, no multiple of group_size {group}"
        )
    if shape is not None and out != shape[0]:
        raise AdapterError(
            f"{where}: {variant} with {sizes['road_theta']} means {out:g} output features, the weight has {shape[0]}"
        )
    if config.get("blocks") is not None:
        _check_blocks(where, module, tensors, config)


def _check_blocks(where: str, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A pair that the configuration does not name must not be turned: who trains the adapter on would lose what it does."""
    try:
        places = own_places(config, module, len(tensors["road_theta"]))
    except UserError as error:
        raise AdapterError(f"{where}: {error}") from error
    if places is None:
        return
    for name, rest in (("road_theta", 0), ("road_alpha", 1)):
        outside = tensors[name].index_fill(0, places, rest)
        if not torch.equal(outside, torch.full_like(outside, rest)):
            wrong = int((outside != rest).nonzero()[0])
            raise AdapterError(
                f"{where}: {name}[{wrong}] is {outside[wrong].item():g}, of a pair outside of the configuration's blocks "
                f"({config['blocks']!r}), where it must be {rest}"
            )


def _check_saved_modules(adapter: AdapterFile, model: torch.nn.Module) -> None:
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in adapter.saved_modules.items():
        if name not in held:
            hint = near_matches(name, held)
            raise AdapterError(
                f"{_another_base(adapter)}: it saved {name!r}, which this {type(model).__name__} does not have{hint}"
            )
        if held[name].shape != tensor.shape:
            labels = (
                " (load it with as many labels: num_labels=...)"
                if tensor.ndim and tensor.shape[1:] == held[name].shape[1:]
                else ""
            )
            raise AdapterError(
                f"{_another_base(adapter)}: it saved {name!r} with shape {list(tensor.shape)}, here it has "
                f"{list(held[name].shape)}{labels}"
            )
