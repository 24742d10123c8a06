"""Read an adapter's folder for serving: a quick look at thousands of them, and the whole of one with every check."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from turnrow.adapters import AdapterFile, read_adapter
from turnrow.adapters.checks import check_against_model, check_base, check_finite
from turnrow.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, adapter_folder, read_config, split_by_module
from turnrow.adapters.manifest import MANIFEST_NAME
from turnrow.errors import AdapterError, near_matches
from turnrow.serving.layers import ServedLayer
from turnrow.serving.store.lora import check_lora
from turnrow.serving.store.parts import Parts, parts_of

__all__ = ["METHODS", "Reader", "Stamp", "stamp_of"]

METHODS = ("ROCOFT", "ROAD", "LORA")
"""The methods that are served."""

Stamp = tuple[tuple[int, int], ...]
"""Size and time of change (ns) of an adapter's files: other numbers mean another adapter."""


def stamp_of(folder: Path) -> Stamp:
    """The stamp of the files in `folder`; of a file that is missing, (-1, -1)."""
    return tuple(_size_and_time(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME))


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads adapters for one model."""

    model: Any
    """The base, without adapters."""
    layers: Mapping[str, ServedLayer]
    dtype: torch.dtype
    """Of the model."""
    check_base: bool = True
    """Whether fingerprints of the base must agree, where an adapter has them."""

    def look(self, path: str | os.PathLike[str]) -> str:
        """Say the method of the adapter in a folder whose configuration and names of tensors are right; no weights are read.

        Raises:
            AdapterError: it is no adapter, of a method that is not served, or of modules that the model does not have.
        """
        folder = adapter_folder(path)
        method = read_config(folder)["peft_type"]
        _check_method(folder, method)
        weights = folder / WEIGHTS_NAME
        if not weights.is_file():
            raise AdapterError(f"the folder {folder} has no {WEIGHTS_NAME}")
        try:
            with safe_open(weights, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{weights} is truncated, damaged or no safetensors file: {error}") from error
        self._check_modules(folder, split_by_module(method, dict.fromkeys(names, torch.empty(0))).modules)
        return method

    def read(self, path: str | os.PathLike[str]) -> Parts:
        """Read an adapter whole, check everything there is to check, and bring it into the form in which it is served.

        Raises:
            AdapterError: says what is wrong with the files, or why the adapter does not fit the model.
        """
        adapter = read_adapter(path)
        _check_method(adapter.path, adapter.method)
        check_finite(adapter)
        _check_nothing_whole(adapter)
        self._check_modules(adapter.path, adapter.modules)
        check_against_model(adapter, self.model)
        if adapter.method == "LORA":
            check_lora(adapter, self.layers)
        if self.check_base:
            check_base(adapter, self.model)
        return parts_of(adapter, self.layers, self.dtype)

    def _check_modules(self, folder: Path, modules: Iterable[str]) -> None:
        for name in modules:
            if name in self.layers:
                continue
            try:
                self.model.get_submodule(name)
            except AttributeError:
                hint = near_matches(name, self.layers)
                raise AdapterError(
                    f"the adapter in {folder} belongs to another base: this {type(self.model).__name__} has no module {name!r}{hint}"
                ) from None
            raise AdapterError(
                f"the adapter in {folder} changes {name!r}, which does not see the tokens of a request in their order (an expert, an "
                "embedding or a part that takes no text): merge it into a base of its own"
            )


def _check_method(folder: Path, method: str) -> None:
    if method not in METHODS:
        raise AdapterError(f"{folder} is a {method} adapter; served are {', '.join(METHODS)}")


def _check_nothing_whole(adapter: AdapterFile) -> None:
    if adapter.saved_modules:
        raise AdapterError(
            f"{adapter.path} holds {next(iter(adapter.saved_modules))!r} trained whole, which cannot differ within a batch: train "
            "without modules_to_save, or merge the adapter into a base of its own"
        )


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
