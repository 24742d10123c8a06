"""What an adapter, or a whole fine-tuning, changes in each weight of its base: one weight at a time, as low-rank factors where it is one.

- RoCoFT: rows, columns and entries from the file. The base is needed for nothing but to say how much that is of its weights.
- LoRA: its factors, scaled, from the file.
- RoAd: angles and scales from the file; what they change, (R - I) W, needs W.
- Any other method of peft, or a LoRA that is none of the plain kind: needs the base, whose layers are merged one by one and put back.
- A fine-tuned model: from the files of both.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.checkpoint import Checkpoint, read_checkpoint, read_tensor
from turnrow.adapters.fingerprint import is_plain, named_weights
from turnrow.adapters.low_rank import low_rank_factors
from turnrow.adapters.merging import layer_values
from turnrow.adapters.rocoft_checks import BIAS
from turnrow.errors import UserError
from turnrow.ops import columns, entries, pairs, rows
from turnrow.ops.experts import FusedWeight

__all__ = [
    "ModelChanges",
    "WeightChange",
    "adapter_changes",
    "merged_changes",
    "model_changes",
    "original_weights",
    "reads_without_base",
]

_PARTS = ("row", "column", "entry")
_FLOATING = {"F64", "F32", "F16", "BF16"}
_STARTS_OF_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of LoRA's init_lora_weights that leave the base's weights as they are."""


@dataclass(frozen=True, eq=False)
class WeightChange:
    """What changed in one weight."""

    name: str
    """The module; of fused experts with the expert, ``experts.down_proj[3]``; of a bias the parameter."""
    delta: Tensor | tuple[Tensor, Tensor] | None
    """The change, float32 (out, in) or (out,); or B (out, r) and A (r, in), whose product it is. None where it is not known without the
    base."""
    weight: Tensor | None
    """What was there before, of the shape of the change; None where the base is not known, or does not hold plain numbers."""
    shape: tuple[int, ...] | None
    """Of the weight; None where no file says it."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """RoCoFT: the indices of the rows, columns or entries, by part."""
    blocks: pairs.Blocks | None = None
    """RoAd: the blocks of R."""


@dataclass(frozen=True, eq=False)
class ModelChanges:
    """What differs between two models."""

    changes: Iterator[WeightChange]
    """Tensors that differ, read as they are asked for."""
    unmatched: list[str]
    """Tensors of the tuned model that the base does not have in this shape, such as a new classifier."""


def reads_without_base(adapter: AdapterFile) -> bool:
    """Whether `adapter_changes` takes it: RoCoFT, RoAd, and LoRA of the plain kind."""
    return adapter.method in ("ROCOFT", "ROAD") or _is_plain_lora(adapter)


def adapter_changes(adapter: AdapterFile, base: nn.Module | None = None) -> Iterator[WeightChange]:
    """What each module of an adapter changes.

    Args:
        adapter: RoCoFT, RoAd or plain LoRA, see `reads_without_base`.
        base: the base model without adapters.

    Raises:
        UserError: another kind of adapter; single entries without a base or a ``turnrow.json`` that says how large their weight is.
    """
    if not reads_without_base(adapter):
        raise UserError(
            f"{adapter.path} is a {adapter.method} adapter whose file does not say by itself what it changes: put it on its base and ask "
            "merged_changes (on the command line: --base MODEL)"
        )
    return _by_module(adapter, base)


def original_weights(adapter: AdapterFile, base: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that an adapter lies on, by module: for `merged_changes` where putting it on changes them.

    Some starts of LoRA (PiSSA, OLoRA, ...) take out of the base what they put into the adapter. Of other adapters nothing is copied.
    """
    if adapter.config.get("init_lora_weights") in _STARTS_OF_THE_BASE:
        return {}
    named = named_weights(base)
    weights = {module: _plain_weight(named.get(module)) for module in adapter.modules}
    return {module: weight.clone() for module, weight in weights.items() if weight is not None}


@torch.no_grad()
def merged_changes(model: PeftModel, originals: Mapping[str, Tensor] | None = None) -> Iterator[WeightChange]:
    """What the active adapter of a model changes, by merging one layer at a time; each is put back before the next.

    Args:
        model: with the adapter on.
        originals: what `original_weights` kept before the adapter was put on.

    Raises:
        UserError: a layer's weight is quantized in a way that is not read.
    """
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer) or not layer.adapter_layer_names:
            continue
        before = layer_values(layer)
        if before is None:
            raise UserError(f"the weight of {name!r} is quantized, so what the adapter changes in it is not known")
        layer.merge()
        after = layer_values(layer)
        layer.unmerge()
        base: Any = layer.get_base_layer()
        for key, values in before.items():
            getattr(base, key).data.copy_(values)  # taking out again rounds
            is_weight = key == "weight"
            turned = is_weight and isinstance(base, Conv1D)
            old, new = (t.mT if turned else t for t in (values, (after or {})[key]))
            old = (originals or {}).get(name, old) if is_weight else old
            delta = new.float() - old.float()
            if delta.any():
                yield WeightChange(name if is_weight else f"{name}.{key}", delta, old, tuple(delta.shape))


def model_changes(tuned: str | os.PathLike[str], base: str | os.PathLike[str]) -> ModelChanges:
    """What a fine-tuned model differs in from its base, from the safetensors files of both, one tensor at a time.

    Names that differ by the base model's prefix alone (``bert.``) are the same.

    Raises:
        UserError: one of the folders has no safetensors files, or the two share no tensor.
    """
    after, before = _checkpoint(tuned), _checkpoint(base)
    names = {_without_prefix(name): name for name in before.files} | {name: name for name in before.files}
    matched: list[tuple[str, str]] = []
    unmatched = []
    for name in after.files:
        same = next((names[key] for key in (name, _without_prefix(name)) if key in names), None)
        if same is None or _entry(after, name)["shape"] != _entry(before, same)["shape"]:
            unmatched.append(name)
        elif {_entry(after, name)["dtype"], _entry(before, same)["dtype"]} <= _FLOATING:
            matched.append((name, same))
    if not matched:
        raise UserError(
            f"the models in {tuned} and {base} have no tensor in common: give the base that the first was made of"
        )

    def changes() -> Iterator[WeightChange]:
        for name, same in matched:
            new, old = (
                read_tensor(held.headers[held.files[own]], own) for held, own in ((after, name), (before, same))
            )
            if not torch.equal(new.to(old.dtype), old):
                yield WeightChange(name.removesuffix(".weight"), new.float() - old.float(), old, tuple(old.shape))

    return ModelChanges(changes(), unmatched)


@dataclass(frozen=True, eq=False)
class _Adapted:
    """What is known of one module that an adapter changes."""

    adapter: AdapterFile
    name: str
    tensors: Mapping[str, Tensor]
    """The adapter's own, by their names in its file; floating ones in float32."""
    weight: Tensor | None
    shape: tuple[int, ...] | None
    bias: Tensor | None


def _by_module(adapter: AdapterFile, base: nn.Module | None) -> Iterator[WeightChange]:
    named = {} if base is None else named_weights(base)
    read = {"ROCOFT": _of_rocoft, "ROAD": _of_road}.get(adapter.method, _of_lora)
    for module, tensors in adapter.modules.items():
        weight = _plain_weight(named.get(module))
        shape = adapter.base_prints[module].shape if module in adapter.base_prints else None
        shape = tuple(weight.shape) if weight is not None else shape
        wide = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
        bias = getattr(named.get(module), "bias", None)
        yield from read(_Adapted(adapter, module, wide, weight, shape, bias if isinstance(bias, Tensor) else None))


def _of_rocoft(module: _Adapted) -> Iterator[WeightChange]:
    own = {key: tensor for key, tensor in module.tensors.items() if key != BIAS}
    if module.name in module.adapter.fused_weights:
        for expert in range(len(next(iter(own.values())))):
            yield _rows_and_columns(
                replace(
                    module,
                    name=f"{module.name}[{expert}]",
                    tensors={key: tensor[expert] for key, tensor in own.items()},
                    weight=None if module.weight is None else module.weight[expert],
                    shape=module.shape and module.shape[1:],
                )
            )
    elif own:
        yield _rows_and_columns(module)
    if BIAS in module.tensors:
        values = module.tensors[BIAS]
        yield WeightChange(f"{module.name}.bias", values, module.bias, tuple(values.shape))


def _rows_and_columns(module: _Adapted) -> WeightChange:
    tensors, shape = module.tensors, module.shape
    parts = {part: tensors[f"rocoft_{part}_index"].long() for part in _PARTS if f"rocoft_{part}" in tensors}
    if "entry" in parts:
        if shape is None:
            raise UserError(
                f"{module.adapter.path} has no turnrow.json that says how large the weight of {module.name!r} is: name the base model "
                "(--base MODEL)"
            )
        delta = entries.dense(tensors["rocoft_entry"], parts["entry"], *shape)
        return WeightChange(module.name, delta, module.weight, shape, parts)
    # Where the size is not known, one that holds all indices gives the same numbers.
    size = shape or (
        len(tensors["rocoft_column"]) + len(parts.get("row", ())) if "column" in parts else int(parts["row"].max()) + 1,
        tensors["rocoft_row"].shape[1] if "row" in parts else int(parts["column"].max()) + 1,
    )
    a, b = low_rank_factors(tensors, rows, columns, *size)
    return WeightChange(module.name, (b, a), module.weight, shape, parts)


@torch.no_grad()
def _of_road(module: _Adapted) -> Iterator[WeightChange]:
    config, weight, bias = module.adapter.config, module.weight, module.bias
    blocks = pairs.coefficients(
        config["variant"], config["group_size"], module.tensors["road_theta"], module.tensors["road_alpha"]
    )
    delta = None if weight is None else pairs.rotate_rows(weight.float(), blocks) - weight.float()
    yield WeightChange(module.name, delta, weight, module.shape, blocks=blocks)
    if bias is not None and is_plain(bias):
        old = bias.detach().float()
        turned = pairs.rotate_rows(old.unsqueeze(1), blocks).squeeze(1)
        if not torch.equal(turned, old):  # of a bias of zeros nothing is turned
            yield WeightChange(f"{module.name}.bias", turned - old, old, tuple(old.shape))


def _of_lora(module: _Adapted) -> Iterator[WeightChange]:
    config = module.adapter.config
    a, b = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
    alphas = config.get("alpha_pattern") or {}
    alpha = next((alphas[key] for key in alphas if re.fullmatch(rf"(.*\.)?{re.escape(key)}", module.name)), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    scaling = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
    yield WeightChange(module.name, (b * scaling, a), module.weight, (len(b), a.shape[1]))


def _is_plain_lora(adapter: AdapterFile) -> bool:
    config = adapter.config
    if adapter.method != "LORA" or config.get("use_dora") or config.get("use_qalora"):
        return False
    plain = config.get("init_lora_weights", True) in _STARTS_OF_THE_BASE and "lora_alpha" in config
    # A pattern may be a regular expression, which is peft's to read.
    plain = plain and all(re.fullmatch(r"[\w.]+", key) for key in config.get("alpha_pattern") or {})
    return plain and all(
        own.keys() == {"lora_A.weight", "lora_B.weight"} and all(tensor.ndim == 2 for tensor in own.values())
        for own in adapter.modules.values()
    )


def _plain_weight(module: Any) -> Tensor | None:
    """(out, in), or (E, out, in) of fused experts; None where there are no plain numbers."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not is_plain(weight):
        return None
    if isinstance(module, FusedWeight):
        return module.matrices().detach()
    return weight.detach().mT if isinstance(module, Conv1D) else weight.detach()


def _checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    found = read_checkpoint(Path(folder)) if Path(folder).is_dir() else None
    if found is None:
        raise UserError(f"{os.fspath(folder)!r} is no folder with the safetensors files of a model")
    return found


def _entry(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    return checkpoint.headers[checkpoint.files[name]].tensors[name]


def _without_prefix(name: str) -> str:
    return name.partition(".")[2]
