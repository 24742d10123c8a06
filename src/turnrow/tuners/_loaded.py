"""The tensors of an adapter that a model has loaded, and whether an adapter in a file has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.folder import KEY_PREFIX
from turnrow.adapters.road_blocks import own_places
from turnrow.adapters.rocoft_checks import describe

__all__ = ["as_held", "difference_in_shape", "tensors_of"]

_SHAPING_FIELDS = {"ROCOFT": ("mode",), "ROAD": ("variant", "group_size")}
"""What of a config decides how a layer computes, beside the shapes of the tensors."""


def tensors_of(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of a loaded adapter themselves, by their keys in a file of it, or those that `as_held` makes of such a file.

    Nothing of the model is touched: `state_dict()` would take the adapter out of the weights first.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            held = _of_layer(module, adapter_name)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            held = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
        else:
            continue
        found |= {f"{KEY_PREFIX}{name}.{key}": tensor for key, tensor in held.items()}
    return found


def as_held(adapter: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a file, of which a layer may hold a part: of RoAd that turns some pairs alone, theirs and where they lie."""
    held = dict(adapter.tensors)
    for module, tensors in adapter.modules.items() if adapter.method == "ROAD" else ():
        places = own_places(adapter.config, module, len(tensors["road_theta"]))
        if places is not None:
            prefix = f"{KEY_PREFIX}{module}"
            held |= {f"{prefix}.{name}": tensor[places] for name, tensor in tensors.items()}
            held[f"{prefix}.road_places"] = places
    return held


def difference_in_shape(
    adapter: AdapterFile, new: Mapping[str, Tensor], loaded: PeftConfig, tensors: Mapping[str, Tensor]
) -> str | None:
    """Say in words the first thing in which an adapter is not of the shape of a loaded one; None if it is.

    Args:
        adapter: the file.
        new: its tensors, as `as_held` gives them.
        loaded: the config of the loaded one.
        tensors: as `tensors_of` gives them.
    """
    method = str(getattr(loaded.peft_type, "value", loaded.peft_type))
    if adapter.method != method:
        return f"its method is {adapter.method}, that of the loaded one {method}"
    for field in _SHAPING_FIELDS[method]:
        theirs, ours = adapter.config[field], getattr(loaded, field)
        if theirs != ours:
            return f"its {field} is {theirs!r}, that of the loaded one {ours!r}"
    for key, old in tensors.items():
        name, value = key.removeprefix(KEY_PREFIX), new.get(key)
        if value is None:
            return f"it has no {name!r}, which the loaded one has"
        if value.shape != old.shape or value.is_floating_point() != old.is_floating_point():
            return f"its {name!r} is {describe(value)}, that of the loaded one {describe(old)}"
    further = next((key for key in new if key not in tensors), None)
    return None if further is None else f"it has {further.removeprefix(KEY_PREFIX)!r}, which the loaded one has not"


def _of_layer(layer: BaseTunerLayer, adapter_name: str) -> dict[str, Tensor]:
    names = (*layer.adapter_layer_names, *layer.other_param_names, "road_places")
    holders: dict[str, Any] = {name: getattr(layer, name, {}) for name in names}
    held = {name: holder[adapter_name] for name, holder in holders.items() if adapter_name in holder}
    # peft counts plain settings, such as RoAd's variant, among the parameters
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}
