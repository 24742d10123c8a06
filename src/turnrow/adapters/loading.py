"""Put a saved adapter on a model, after checking that the file is whole and the model is the adapter's base."""

from __future__ import annotations

import os

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.checks import check_against_model, check_finite
from turnrow.adapters.checks import check_base as compare_base
from turnrow.adapters.loadable import loadable_config
from turnrow.adapters.reading import read_adapter
from turnrow.errors import AdapterError, UserError

__all__ = ["load_adapter"]


def load_adapter(
    model: torch.nn.Module, path: str | os.PathLike[str], *, check_base: bool = True, is_trainable: bool = False
) -> PeftModel:
    """Load the adapter in `path` onto `model`, as ``PeftModel.from_pretrained`` does, and refuse what does not fit.

    Args:
        model: the base model, without adapters. It is changed in place, as peft does.
        path: the adapter's folder.
        check_base: compare the model's weights with the fingerprint in ``turnrow.json``. Without that file there is
            nothing to compare with. The sizes of the modules are checked in any case.
        is_trainable: load it for more training instead of for inference.

    Raises:
        AdapterError: as `read_adapter`; the adapter holds NaN or infinite values; it belongs to another base (the first
            module that differs is named).
        UserError: `model` has adapters already; prompts and prefixes are to be trained on, which peft does not do.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} has an adapter already, so its weights are not those of the base: load onto the plain "
            "model, or add a second adapter with PeftModel.load_adapter(path, adapter_name=...)"
        )
    adapter = read_adapter(path)
    check_finite(adapter)
    check_against_model(adapter, model)
    if check_base:
        compare_base(adapter, model)
    config = loadable_config(adapter) if adapter.method in ("ROCOFT", "ROAD") else None
    if adapter.lies_beside and is_trainable:
        raise UserError(f"{adapter.path} is a {adapter.method} adapter, which peft cannot load for more training")
    # peft's AdaLoRA asks for the adapter that trains wherever a loss is computed.
    as_trainable = is_trainable or adapter.method == "ADALORA"
    loaded = PeftModel.from_pretrained(model, str(adapter.path), config=config, is_trainable=as_trainable)
    if not is_trainable:
        loaded.requires_grad_(False)  # of AdaLoRA, and heads beside prompts, which peft leaves trainable
    _check_saved_modules_found(adapter, loaded)
    return loaded


def _check_saved_modules_found(adapter: AdapterFile, model: PeftModel) -> None:
    """peft ignores tensors of modules that the configuration does not name; biases it loads wherever they were trained.

    Prompts and prefixes lie beside the model: their file holds one tensor of them, and names modules one level further out.
    """
    biases = adapter.config.get("bias", "none") != "none"
    wrapped = [
        name for name, module in model.get_base_model().named_modules() if isinstance(module, ModulesToSaveWrapper)
    ]
    for name in adapter.saved_modules:
        if adapter.lies_beside:
            if name == "prompt_embeddings":
                continue
            name = name.removeprefix("base_model.")
        if not any(name.startswith(f"{module}.") for module in wrapped) and not (biases and name.endswith(".bias")):
            named = adapter.config.get("modules_to_save")
            raise AdapterError(
                f"{adapter.path}: the file holds {name!r}, which is no module of the configuration's modules_to_save ({named})"
            )
