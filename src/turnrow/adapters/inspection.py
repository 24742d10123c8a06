"""What is in an adapter: method, base, modules, indices, sizes, norms, dtypes, counts, provenance."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.folder import WEIGHTS_NAME
from turnrow.adapters.manifest import recipe_sha256
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.road_blocks import own_places

__all__ = ["AdapterSummary", "ModuleSummary", "inspect_adapter"]


@dataclass(frozen=True)
class ModuleSummary:
    """What an adapter holds for one module."""

    name: str

    shape: list[int] | None
    """(out, in) of the base weight, (E, out, in) of fused experts; None without ``turnrow.json``."""

    indices: dict[str, list[Any]] | None
    """The rows, columns or entries (row * in + column) that are changed, by part (RoCoFT), a list for each expert where the weight has
    several; None for other methods."""

    parameters: int
    """Number of trained values."""

    norms: dict[str, float]
    """Frobenius norm of each trained tensor; of `road_alpha`, of its distance from 1, where it has no effect."""

    dtypes: list[str]

    non_finite: int
    """How many of the values are NaN or infinite."""


@dataclass(frozen=True)
class AdapterSummary:
    """What `inspect_adapter` found."""

    path: str
    method: str

    settings: dict[str, Any]
    """The settings in ``adapter_config.json`` that are set, without those listed elsewhere here."""

    base: str | None
    """Name of the base model."""

    task_type: str | None
    modules: list[ModuleSummary]

    saved: list[ModuleSummary]
    """Parameters trained whole (`modules_to_save`), such as a classifier's, one entry each."""

    shared: list[ModuleSummary]
    """What the adapted modules have in common, trained (VB-LoRA's bank of vectors) or only drawn (VeRA's projections), one entry each."""

    parameters: int
    """Number of trained values, over `modules` and `saved`."""

    file_bytes: int
    dtypes: dict[str, int]
    """Number of tensors by dtype, indices included."""

    non_finite: dict[str, int]
    """NaN or infinite values by tensor key."""

    fingerprinted: bool
    """Whether ``turnrow.json`` is there, so that loading checks the file and the base."""

    versions: dict[str, str]

    recipe_sha256: str | None
    """Equal for two adapters that were made by the same recipe; None where the manifest tells of none."""

    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


_LISTED_ELSEWHERE = {"peft_type", "base_model_name_or_path", "task_type", "peft_version"}


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterSummary:
    """Read an adapter folder of any method of peft and say what is in it. No base model is needed.

    Raises:
        UserError: as `read_adapter`. Values that are not finite are no error here, they are part of the answer.
    """
    adapter = read_adapter(path)
    shapes = {name: list(print_.shape) for name, print_ in adapter.base_prints.items()}
    modules = [
        _summary(name, tensors, shapes.get(name), _untrained(adapter, name, tensors))
        for name, tensors in sorted(adapter.modules.items(), key=_natural)
    ]
    saved, shared = (
        [_summary(name, {name: tensor}, list(tensor.shape)) for name, tensor in tensors.items()]
        for tensors in (adapter.saved_modules, adapter.shared)
    )
    config, manifest = adapter.config, adapter.manifest or {}
    return AdapterSummary(
        path=str(adapter.path),
        method=adapter.method,
        settings={
            key: value for key, value in config.items() if value not in (None, [], {}) and key not in _LISTED_ELSEWHERE
        },
        base=adapter.base_name,
        task_type=config.get("task_type"),
        modules=modules,
        saved=saved,
        shared=shared,
        parameters=sum(summary.parameters for summary in (*modules, *saved)),
        file_bytes=(Path(adapter.path) / WEIGHTS_NAME).stat().st_size,
        dtypes=dict(Counter(_dtype(tensor) for tensor in adapter.tensors.values())),
        non_finite=adapter.non_finite(),
        fingerprinted=adapter.manifest is not None,
        versions=manifest.get("versions", {}),
        recipe_sha256=_recipe_sha256(manifest.get("provenance", {})),
        provenance=manifest.get("provenance", {}),
    )


def _recipe_sha256(provenance: Mapping[str, Any]) -> str | None:
    """Of the recipe itself where it is there: manifests of before have no digest, and those of another turnrow may have another."""
    recipe, recorded = provenance.get("recipe"), provenance.get("recipe_sha256")
    if isinstance(recipe, dict):
        with suppress(ValueError, RecursionError):  # a file may hold NaN, or lists in lists without end
            return recipe_sha256(recipe)
    return recorded if isinstance(recorded, str) else None


def _untrained(adapter: AdapterFile, name: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """How many values of a RoAd adapter's module were never trained: of pairs that are not its own, and what it does not learn."""
    if adapter.method != "ROAD":
        return 0
    size = len(tensors["road_theta"])
    places = own_places(adapter.config, name, size)
    learned = 1 if adapter.config.get("train") in (["angle"], ["scale"]) else 2
    return 2 * size - learned * (size if places is None else len(places))


def _summary(
    name: str, tensors: Mapping[str, torch.Tensor], shape: list[int] | None, untrained: int = 0
) -> ModuleSummary:
    trained = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    indices = {
        key.removeprefix("rocoft_").removesuffix("_index"): tensor.tolist()
        for key, tensor in tensors.items()
        if key.startswith("rocoft_") and key.endswith("_index")
    }
    return ModuleSummary(
        name=name,
        shape=shape,
        indices=indices or None,
        parameters=sum(tensor.numel() for tensor in trained.values()) - untrained,
        norms={key.rpartition(".")[2] if key == name else key: _norm(key, tensor) for key, tensor in trained.items()},
        dtypes=sorted({_dtype(tensor) for tensor in trained.values()}),
        non_finite=sum(int((~torch.isfinite(tensor)).sum()) for tensor in trained.values()),
    )


def _norm(key: str, tensor: torch.Tensor) -> float:
    values = tensor.double()
    return torch.linalg.vector_norm(values - 1 if key == "road_alpha" else values).item()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _natural(item: tuple[str, Any]) -> list[tuple[bool, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in item[0].split(".")]
