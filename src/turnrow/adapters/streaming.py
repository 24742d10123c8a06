"""Merge an adapter into the files of its base, one weight at a time: memory is that of the largest weight and of the adapter.

Each file of the base is copied, and the weights that the adapter changes are read from the copy, changed by the equations that
merging in a model calls, and written back in their place. All other bytes stay as they are: dtypes, names, tied weights.

Not every checkpoint can be merged so: its tensors must have the names and shapes of the model's parameters (the base model's
prefix aside), which transformers may change on loading, and must not be quantized. `why_not_stream` says why not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.applying import apply, original_values, put_original_values
from turnrow.adapters.base_model import skeleton
from turnrow.adapters.checkpoint import (
    Checkpoint,
    Header,
    copy_with_header,
    read_checkpoint,
    read_tensor,
    write_index,
    write_tensor,
)
from turnrow.adapters.checks import base_difference, check_against_model, check_finite
from turnrow.adapters.fingerprint import fingerprint_of_values, named_weights
from turnrow.adapters.merging import MergeResult
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import check_new_folder, copy_beside, new_folder
from turnrow.errors import UserError
from turnrow.ops.experts import FusedWeight

__all__ = [
    "ORIGINALS_NAME",
    "MergePlan",
    "merge_files",
    "plan_merge",
    "store_originals",
    "unmerge_files",
    "why_not_stream",
]

ORIGINALS_NAME = "rocoft_originals.safetensors"
"""Beside an adapter: what of the base its rows, columns or entries replace, ``{module}.{part}``, in the dtype of the base."""

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".index.json")
_FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class MergePlan:
    """Where in the files of a base the weights are that an adapter changes. Making it builds the model without weights."""

    adapter: AdapterFile
    checkpoint: Checkpoint
    model: PreTrainedModel
    """On the meta device."""
    rename: dict[str, str]
    """Names in the files to those of the model's parameters, where they differ."""
    weights: dict[str, str]
    """Names in the files, by module."""
    biases: dict[str, str]
    transposed: dict[str, bool]
    """Whether the weight is stored as (in, out), by module."""


def why_not_stream(adapter: AdapterFile, base: str | os.PathLike[str]) -> str | None:
    """Why the files of `base` cannot be merged one weight at a time, in words; None if they can."""
    found = plan_merge(adapter, base)
    return found if isinstance(found, str) else None


def merge_files(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    processor: Any | None = None,
    check_base: bool = True,
    plan: MergePlan | str | None = None,
) -> MergeResult:
    """Merge the adapter in `path` into the model in the folder `base` and write the result to `out`, all of it or nothing.

    The result is what `merge_adapter` writes, bit for bit, in the base's own files and dtypes.

    Args:
        path: the adapter's folder, RoCoFT or RoAd.
        base: the folder of the base model.
        out: a new or empty folder.
        processor: a tokenizer or processor to save beside the model; None copies what lies beside the base.
        check_base: compare each weight with its fingerprint before it is changed.
        plan: what `plan_merge` made of this adapter and base, if it was asked before; it is not made again.

    Raises:
        UserError: the base cannot be merged so (`why_not_stream`); it is another base; a merged weight overflows.
    """
    check_new_folder(out)
    plan = _checked_plan(path, base, plan)
    adapter = plan.adapter
    check_finite(adapter)
    changes: dict[str, tuple[float, float]] = {}

    def merge(module: str, weight: Tensor, bias: Tensor | None) -> None:
        tensors = adapter.modules[module]
        if check_base:
            _compare(adapter, module, weight, plan.transposed[module])
        before = weight.clone(), None if bias is None else bias.clone()
        apply(weight, bias, tensors, adapter.config)
        changes[module] = _change(module, before, (weight, bias))

    with new_folder(out) as folder:
        _write_model(plan, folder, merge, _saved(adapter, plan))
        _write_config(plan, folder)
        _copy_rest(plan.checkpoint.folder, folder, processor)
    return MergeResult(Path(out), {name: changes[name] for name in adapter.modules}, sorted(adapter.saved_modules))


def store_originals(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    check_base: bool = True,
    plan: MergePlan | str | None = None,
) -> Path:
    """Write what a RoCoFT adapter replaces in its base beside it, so that `unmerge_files` can put it back.

    Args:
        path, base, check_base, plan: as `merge_files` takes them.

    Raises:
        UserError: as `merge_files`; the adapter is no RoCoFT adapter, or changes biases or modules whole.
    """
    adapter = plan.adapter if isinstance(plan, MergePlan) else read_adapter(path)
    _check_restorable(adapter)
    plan = _checked_plan(path, base, plan)
    originals: dict[str, Tensor] = {}
    for module, name in plan.weights.items():
        header = plan.checkpoint.headers[plan.checkpoint.files[name]]
        weight = _oriented(read_tensor(header, name), plan.transposed[module])
        if check_base:
            _compare(adapter, module, weight, plan.transposed[module])
        for part, values in original_values(weight, adapter.modules[module]).items():
            originals[f"{module}.{part}"] = values.contiguous()
    draft = adapter.path / f".{ORIGINALS_NAME}"
    save_file(originals, draft, metadata={"format": "pt"})
    os.replace(draft, adapter.path / ORIGINALS_NAME)
    return adapter.path / ORIGINALS_NAME


def unmerge_files(
    path: str | os.PathLike[str], merged: str | os.PathLike[str], out: str | os.PathLike[str]
) -> MergeResult:
    """Take a RoCoFT adapter out of the model in the folder `merged` again: the base's weights, bit for bit.

    Raises:
        UserError: the adapter carries no originals (`store_originals`), or `merged` does not hold what merging it would give.
    """
    check_new_folder(out)
    adapter = read_adapter(path)
    _check_restorable(adapter)
    if not (adapter.path / ORIGINALS_NAME).is_file():
        raise UserError(
            f"{adapter.path} has no {ORIGINALS_NAME}, so what it replaced is not known: write it from the base first (turnrow merge --keep-base)"
        )
    originals = load_file(adapter.path / ORIGINALS_NAME)
    plan = _checked_plan(path, merged, plan_merge(adapter, merged))
    changes: dict[str, tuple[float, float]] = {}

    def unmerge(module: str, weight: Tensor, bias: Tensor | None) -> None:
        tensors = adapter.modules[module]
        own = {
            part: originals[f"{module}.{part}"]
            for part in ("row", "column", "entry")
            if f"{module}.{part}" in originals
        }
        before = weight.clone()
        put_original_values(weight, tensors, own)
        again = weight.clone()
        apply(again, None, tensors, adapter.config)
        if not torch.equal(again, before):
            raise UserError(
                f"the model in {merged} does not hold this adapter: {module!r} is not what merging it gives. Nothing was written"
            )
        changes[module] = _change(module, (before, None), (weight, None))

    with new_folder(out) as folder:
        _write_model(plan, folder, unmerge, {})
        _write_config(plan, folder)
        _copy_rest(plan.checkpoint.folder, folder, None)
    return MergeResult(Path(out), {name: changes[name] for name in adapter.modules}, [])


def plan_merge(adapter: AdapterFile, base: str | os.PathLike[str]) -> MergePlan | str:
    """The plan by which `merge_files` merges `adapter` into the files of `base`; in words why not, where they cannot be merged so."""
    if adapter.method not in ("ROCOFT", "ROAD"):
        return f"{adapter.method} adapters are merged in a model"
    if adapter.manifest is not None and adapter.manifest["base"].get("quantization") is not None:
        return "the adapter belongs to a base that is quantized while it is loaded"
    folder = Path(base)
    if not folder.is_dir():
        return f"{str(base)!r} is no folder"
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        return f"{folder} has no safetensors files"
    model = skeleton(adapter, str(folder))
    if getattr(model.config, "quantization_config", None) is not None:
        return "it is quantized"
    named, files = named_weights(model), checkpoint.files
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    in_model = {name: name if name in shapes else f"{prefix}{name}" for name in files}
    place = {inner: name for name, inner in in_model.items() if inner in shapes}
    weights: dict[str, str] = {}
    biases: dict[str, str] = {}
    transposed: dict[str, bool] = {}
    for module in adapter.modules:
        held = named.get(module)
        if held is None:
            continue  # `check_against_model` says so
        is_fused = isinstance(held, FusedWeight)
        transposed[module] = held.transposed if isinstance(held, FusedWeight) else isinstance(held, Conv1D)
        for kind, found in (("weight", weights), ("bias", biases)):
            inner = f"{module}.{kind}" if not is_fused else (module if kind == "weight" else f"{module}_bias")
            if inner not in shapes:
                continue
            name = place.get(inner)
            if name is None:
                return f"it has no tensor {inner!r}: transformers reads it from others, or it is tied to another"
            entry = checkpoint.headers[files[name]].tensors[name]
            if entry["shape"] != shapes[inner] or entry["dtype"] not in _FLOATING:
                return f"its {name!r} is {entry['dtype']} {entry['shape']}, the model's is {shapes[inner]}"
            found[module] = name
    rename = {name: inner for name, inner in in_model.items() if name != inner and inner in shapes}
    return MergePlan(adapter, checkpoint, model, rename, weights, biases, transposed)


def _checked_plan(
    path: str | os.PathLike[str], base: str | os.PathLike[str], plan: MergePlan | str | None
) -> MergePlan:
    if plan is None:
        plan = plan_merge(read_adapter(path), base)
    if isinstance(plan, str):
        raise UserError(f"{base} cannot be merged file by file: {plan}")
    planned = plan.adapter.path, plan.checkpoint.folder
    if planned != (Path(path), Path(base)):
        raise UserError(f"the plan is for {planned[0]} and {planned[1]}, not for {path} and {base}: make it of these")
    check_against_model(plan.adapter, plan.model)
    return plan


def _write_model(
    plan: MergePlan,
    folder: Path,
    change: Callable[[str, Tensor, Tensor | None], None],
    saved: Mapping[str, Tensor],
) -> None:
    """Copy the files of the base and change weights and biases in the copies; append what no file has a place for."""
    checkpoint, files = plan.checkpoint, plan.checkpoint.files
    replaced = {name: t for name, t in saved.items() if _fits(plan, name, t)}
    added = {name: t for name, t in saved.items() if name not in replaced}
    headers: dict[str, Header] = {}
    last = list(checkpoint.headers)[-1]
    for file, header in checkpoint.headers.items():
        headers[file] = copy_with_header(
            header,
            folder / file,
            rename={name: plan.rename[name] for name in header.tensors if name in plan.rename},
            drop={name for name in header.tensors if plan.rename.get(name, name) in added},
            add=added if file == last else {},
        )
    where = {plan.rename.get(name, name): file for name, file in files.items()}
    for module, name in plan.weights.items():
        own_name = plan.rename.get(name, name)
        header = headers[where[own_name]]
        stored = read_tensor(header, own_name)
        bias_name = plan.biases.get(module)
        bias_name = None if bias_name is None else plan.rename.get(bias_name, bias_name)
        bias = None if bias_name is None else read_tensor(headers[where[bias_name]], bias_name)
        change(module, _oriented(stored, plan.transposed[module]), bias)
        write_tensor(header, own_name, stored)
        if bias_name is not None and bias is not None:
            write_tensor(headers[where[bias_name]], bias_name, bias)
    for name, tensor in replaced.items():
        write_tensor(headers[where[name]], name, tensor)
    if checkpoint.is_sharded:
        write_index(folder, headers)


def _saved(adapter: AdapterFile, plan: MergePlan) -> dict[str, Tensor]:
    """Modules trained whole, in the dtype that the files have."""
    dtypes = [_dtype(plan, name) for name in plan.weights.values()]
    return {name: tensor.to(dtypes[0]) for name, tensor in adapter.saved_modules.items()}


def _dtype(plan: MergePlan, name: str) -> torch.dtype:
    """Of a tensor in the files."""
    return plan.checkpoint.headers[plan.checkpoint.files[name]].dtype(name)


def _fits(plan: MergePlan, name: str, tensor: Tensor) -> bool:
    """Whether a file has a place for a parameter that is replaced whole."""
    stored = next((own for own in plan.checkpoint.files if plan.rename.get(own, own) == name), None)
    if stored is None:
        return False
    entry = plan.checkpoint.headers[plan.checkpoint.files[stored]].tensors[stored]
    return entry["shape"] == list(tensor.shape) and entry["dtype"] in _FLOATING and _dtype(plan, stored) == tensor.dtype


def _compare(adapter: AdapterFile, module: str, weight: Tensor, transposed: bool) -> None:
    expected = adapter.base_prints.get(module)
    if expected is None or expected.sample is None or not weight.numel():
        return
    own = adapter.modules[module] if expected.own is None else expected.own
    difference = expected.difference(fingerprint_of_values(weight, own, transposed=transposed))
    if difference is not None:
        raise base_difference(adapter, module, difference)


def _change(
    module: str, before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None]
) -> tuple[float, float]:
    """Norms of the change and of what was there."""
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    change = math.hypot(*(torch.linalg.vector_norm(new.float() - old.float()).item() for old, new in pairs))
    if not math.isfinite(change):
        raise UserError(f"merging gives NaN or infinite values in {module!r}: the base's dtype is too narrow")
    return change, math.hypot(*(torch.linalg.vector_norm(old, dtype=torch.float32).item() for old, _ in pairs))


def _oriented(stored: Tensor, transposed: bool) -> Tensor:
    """(out, in), a view."""
    return stored.mT if transposed else stored


def _check_restorable(adapter: AdapterFile) -> None:
    if adapter.method != "ROCOFT":
        raise UserError(
            f"{adapter.path} is a {adapter.method} adapter: only ROCOFT adapters replace values that can be put back"
        )
    biased = next((module for module, tensors in adapter.modules.items() if "rocoft_bias" in tensors), None)
    if biased is not None or adapter.saved_modules:
        what = f"the bias of {biased!r}" if biased is not None else f"{next(iter(adapter.saved_modules))!r}, whole"
        raise UserError(f"{adapter.path} also changes {what}, which cannot be put back: keep the base model instead")


def _write_config(plan: MergePlan, folder: Path) -> None:
    config = plan.model.config
    config.architectures = [type(plan.model).__name__]
    config.save_pretrained(folder)


def _copy_rest(base: Path, folder: Path, processor: Any | None) -> None:
    """The files beside the weights: generation settings, and the tokenizer where none is given."""
    if processor is not None:
        processor.save_pretrained(folder)
    copy_beside(base, folder, but=_NOT_COPIED)
