"""A base model without its weights, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from turnrow.errors import UserError
from turnrow.pretrained import plain_errors, resolve_model, without_load_report
from turnrow.training.base import head_modules, keep_float32, load_model, whole_modules

__all__ = ["Skeleton", "load_skeleton"]


@dataclass(frozen=True)
class Skeleton:
    """A base model without weights, on the meta device."""

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    """As of `Base`."""


def load_skeleton(name: str, auto_model: str, settings: Mapping[str, Any], *, dtype: str = "float32") -> Skeleton:
    """What `load_base` would load without quantization, on the meta device: no weight is read, none is downloaded.

    Args:
        name: as in `Recipe.model`; a folder may hold nothing but ``config.json``.
        auto_model: as in `Task.auto_model`.
        settings: as of `Task.model_kwargs`.
        dtype: of the frozen weights.

    Raises:
        UserError: there is no such model, it cannot be had without network, or it is saved quantized.
    """
    location = resolve_model(name)
    with plain_errors(name):
        config = AutoConfig.from_pretrained(location, **settings)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model {name!r} is saved quantized, and its layers cannot be made without its weights; give the model it was "
            "made from, and quantization in the recipe"
        )
    try:
        # Reads the names and sizes in the headers of the files, as far as there are any here.
        model, new_modules = load_model(
            name, location, auto_model, dtype=dtype, device_map="meta", local_files_only=True, **settings
        )
    except UserError:
        with plain_errors(name), without_load_report(), torch.device("meta"):
            model = getattr(transformers, auto_model).from_config(config, dtype=getattr(torch, dtype))
        new_modules = whole_modules(model, _absent_by_architecture(model))
    for module_name in head_modules(model, new_modules):
        keep_float32(model.get_submodule(module_name))
    return Skeleton(model, new_modules)


def _absent_by_architecture(model: PreTrainedModel) -> set[str]:
    """Parameters that the model named in the config does not have, and so neither does its checkpoint."""
    stored = getattr(transformers, (model.config.architectures or [""])[0], None)
    prefix = f"{model.base_model_prefix}."
    # A name out of a file may choose among transformers' models, nothing else.
    if not (isinstance(stored, type) and issubclass(stored, PreTrainedModel)):
        return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    with torch.device("meta"):
        names = {name.removeprefix(prefix) for name, _ in stored(model.config).named_parameters()}
    return {name for name, _ in model.named_parameters() if name.removeprefix(prefix) not in names}
