"""The configuration that an adapter is loaded by: what its tensors say, not what the file says of them.

An ``adapter_config.json`` may come from anywhere. What chooses modules and ranks in it, names and regular expressions, would be run
against the model before a tensor is looked at: an expression can take forever, and a rank can ask for any amount of
memory. The tensors have been checked against the configuration and the model by then, so modules, ranks and indices are
taken from them, and of the rest only what has the right type.
"""

from __future__ import annotations

import re
from typing import Any

from peft import PeftConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.folder import CONFIG_NAME
from turnrow.adapters.rocoft_checks import parts_in
from turnrow.errors import AdapterError

__all__ = ["loadable_config"]

_TEXTS = ("base_model_name_or_path", "revision")


def loadable_config(adapter: AdapterFile) -> PeftConfig:
    """The configuration of a RoCoFT or RoAd adapter that was checked, as an object of its method.

    Raises:
        AdapterError: a value in ``adapter_config.json`` has the wrong type or is not allowed; names the file and the value.
    """
    path = adapter.path / CONFIG_NAME
    config = adapter.config
    fields: dict[str, Any] = {name: _text(path, name, config.get(name)) for name in _TEXTS}
    fields["task_type"] = _task_type(path, config.get("task_type"))
    fields["modules_to_save"] = _whole_modules(adapter, path)
    fields["inference_mode"] = True
    fields |= _of_rocoft(adapter) if adapter.method == "ROCOFT" else _of_road(adapter)
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter.method)](**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path} is not usable: {error}") from error


def _of_rocoft(adapter: AdapterFile) -> dict[str, Any]:
    config = adapter.config
    own = {name: parts_in(tensors) for name, tensors in adapter.modules.items()}
    fused = set(adapter.fused_weights)
    fields: dict[str, Any] = {
        name: config[name] for name in ("mode", "bias", "density", "selection", "selection_seed") if name in config
    }
    fields["target_modules"] = [name for name, parts in own.items() if parts and name not in fused]
    fields["target_parameters"] = [name for name, parts in own.items() if parts and name in fused]
    if config.get("mode") != "entry":
        ranks = {len(index[0] if name in fused else index) for name, parts in own.items() for index in parts.values()}
        fields["r"] = max(ranks)
        if len(ranks) > 1 or config.get("indices"):
            row_and_column = config.get("mode") == "row+column"
            fields["indices"] = {
                name: parts if row_and_column else next(iter(parts.values())) for name, parts in own.items() if parts
            }
    return fields


def _of_road(adapter: AdapterFile) -> dict[str, Any]:
    config = adapter.config
    fields = {"variant": config["variant"], "group_size": config["group_size"], "target_modules": list(adapter.modules)}
    return fields | {name: config[name] for name in ("blocks", "train") if config.get(name) is not None}


def _text(path: Any, name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{path}: {name} is {value!r}; it must be a text or null")
    return value


def _task_type(path: Any, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in TaskType.__members__):
        allowed = ", ".join(TaskType.__members__)
        raise AdapterError(f"{path}: task_type is {value!r}; it must be null or one of {allowed}")
    return value


def _whole_modules(adapter: AdapterFile, path: Any) -> list[str] | None:
    value = adapter.config.get("modules_to_save")
    if value is None:
        return None
    # peft takes the names as regular expressions
    if not isinstance(value, list) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in value
    ):
        raise AdapterError(f"{path}: modules_to_save is {value!r}; it must be null or a list of names")
    for module in adapter.modules:
        parts = module.split(".")
        outer = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        name = next((name for name in value if any(place.endswith(name) for place in outer)), None)
        if name is not None:
            raise AdapterError(
                f"{path}: modules_to_save names {name!r} to be held whole, and the file has changes of {module!r}, which lies in it"
            )
    # peft takes every module whose name ends so; of the file's tensors a name is one or more whole parts
    held = [f".{name}." for name in adapter.saved_modules]
    return [name for name in value if any(f".{name}." in one for one in held)] or None
