"""The two files of peft's adapter layout, `adapter_config.json` and `adapter_model.safetensors`, read without running any code.

Keys of the weights are ``base_model.model.<module>.<parameter>``, without the adapter's name; what the modules of an adapter have in
common lies one level further out, ``base_model.<parameter>``.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.peft_types import PeftType
from safetensors import SafetensorError, safe_open

from turnrow.errors import AdapterError, near_matches

__all__ = [
    "CONFIG_NAME",
    "KEY_PREFIX",
    "WEIGHTS_NAME",
    "Tensors",
    "adapter_folder",
    "lies_beside",
    "read_config",
    "read_json_object",
    "read_tensor_file",
    "read_tensors",
    "split_by_module",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
_WRAPPER = "base_model."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return `path` as the folder of an adapter.

    Raises:
        AdapterError: there is no such folder, or it holds no ``adapter_config.json`` (those in folders inside are named).
    """
    folder = Path(path)
    if folder.is_file():
        raise AdapterError(f"{folder} is a file: give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    if not folder.is_dir():
        raise AdapterError(
            f"no adapter folder {str(path)!r}: turnrow reads local folders; for one on the Hub, "
            f"run `hf download {path} --local-dir FOLDER` first"
        )
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG_NAME}"))
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        hint = f"; did you mean {' or '.join(inside)}?" if inside else f" (it holds {held})"
        raise AdapterError(f"the folder {folder} has no {CONFIG_NAME}{hint}")
    return folder


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        AdapterError: it is not UTF-8, not JSON (line and column are named) or something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise AdapterError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from error
    except RecursionError as error:
        raise AdapterError(f"{path} is not usable: its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a JSON {type(value).__name__}, an object {{...}} is needed")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        AdapterError: it is not a JSON object, or its `peft_type` is missing or unknown to the installed peft and turnrow.
    """
    path = folder / CONFIG_NAME
    config = read_json_object(path)
    allowed = sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)
    method = config.get("peft_type")
    if method is None:
        raise AdapterError(
            f"{path} has no 'peft_type', so it is not the configuration of an adapter (keys: {', '.join(sorted(config)) or 'none'})"
        )
    if method not in allowed:
        hint = near_matches(str(method), allowed) or f"; known are {', '.join(allowed)}"
        raise AdapterError(f"{path}: unknown peft_type {method!r}{hint}")
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read ``adapter_model.safetensors``. Pickle files are never opened: unpickling runs whatever code they hold.

    Raises:
        AdapterError: the file is missing, is a pickle, is a Git LFS pointer, or is truncated or damaged.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLES and entry.is_file())
        # the training arguments that transformers saves beside an adapter are no weights
        pickles = [name for name in pickles if name != "training_args.bin"]
        if pickles:
            raise AdapterError(
                f"{folder / pickles[0]} is a pickle file, and reading one can run any code that is hidden in it: turnrow reads "
                f"only {WEIGHTS_NAME}. If you trust the file's origin, load it once with torch.load(..., weights_only=True), "
                f"write the tensors with safetensors.torch.save_file(tensors, '{WEIGHTS_NAME}') and delete the pickle"
            )
        raise AdapterError(
            f"the folder {folder} has no {WEIGHTS_NAME} (it holds {', '.join(sorted(e.name for e in folder.iterdir()))})"
        )
    return read_tensor_file(path)


def read_tensor_file(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        AdapterError: it is a Git LFS pointer, truncated, damaged or of another format, or holds no tensors.
    """
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git"):
            raise AdapterError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated, damaged or no safetensors file: {error}"
        ) from error
    if not tensors:
        raise AdapterError(f"{path} holds no tensors")
    return tensors


class Tensors(NamedTuple):
    """The tensors of an adapter, sorted by what they belong to."""

    modules: dict[str, dict[str, torch.Tensor]]
    """Those of the adapted modules: ``{module: {parameter: tensor}}``."""
    saved: dict[str, torch.Tensor]
    """Of modules trained whole, by full name: what `modules_to_save` holds (a classifier)."""
    shared: dict[str, torch.Tensor]
    """What the adapted modules have in common, by its key without ``base_model.``: VeRA's projections, VB-LoRA's bank of vectors."""


def split_by_module(method: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Sort the tensors of an adapter by the module that they adapt.

    Args:
        method: the adapter's `peft_type`; peft's table says how the parameters of that method begin (``rocoft_``).
        tensors: the contents of an adapter's file.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(method))
    sorted_ = Tensors(defaultdict(dict), {}, {})
    for key, tensor in tensors.items():
        if key.startswith(_WRAPPER) and not key.startswith(KEY_PREFIX) and not lies_beside(method):
            sorted_.shared[key.removeprefix(_WRAPPER)] = tensor
            continue
        parts = key.removeprefix(KEY_PREFIX).split(".")
        start = next((i for i, part in enumerate(parts) if prefix and i and part.startswith(prefix)), None)
        if start is None:
            sorted_.saved[".".join(parts)] = tensor
        else:
            sorted_.modules[".".join(parts[:start])][".".join(parts[start:])] = tensor
    return sorted_._replace(modules=dict(sorted_.modules))


def lies_beside(method: str) -> bool:
    """Whether a method of peft changes no weight and no layer: prompts and prefixes, which are tokens put before the text.

    Their models are wrapped once less, so that a classifier's key begins with ``base_model.`` alone.
    """
    return issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)], PromptLearningConfig)
