"""A RoCoFT adapter out of a fully fine-tuned model: what it changed in its base, as rows, columns or entries.

Exact where the fine-tuning changed no more rows (columns, entries) than are taken, otherwise the nearest in the Frobenius
norm, with what is left out said module by module.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from turnrow.adapters.algebra.rocoft import tensors_of, unused
from turnrow.adapters.derived import write_derived_adapter
from turnrow.adapters.fingerprint import WeightPrint, fingerprint, is_plain
from turnrow.adapters.folder import KEY_PREFIX
from turnrow.adapters.numbers import is_count, is_number
from turnrow.adapters.rocoft_checks import BIAS, MODES
from turnrow.adapters.writing import check_new_folder
from turnrow.errors import UserError, near_matches
from turnrow.ops import entries
from turnrow.ops.subset import best_columns, best_entries, best_rows, best_rows_and_columns, residual
from turnrow.ops.union import Change

__all__ = ["Extraction", "extract_adapter"]

_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Extraction:
    """What was taken out, and what was not."""

    path: Path
    """The folder of the adapter."""
    norms: dict[str, tuple[float, float]]
    """By module: Frobenius norms of what the fine-tuning changed, and of what the adapter leaves out of that."""
    left_out: dict[str, float]
    """Parameters that changed and are of no module that was taken, with the norm of their change."""
    saved_modules: list[str]
    """Parameters that the adapter holds whole."""

    @property
    def residual(self) -> float:
        """What is left out of all modules together, over what they changed; 0 is exact."""
        changed = math.hypot(*(change for change, _ in self.norms.values()))
        return math.hypot(*(rest for _, rest in self.norms.values())) / changed if changed else 0.0


def extract_adapter(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    mode: str = "row",
    r: int | None = None,
    density: float | None = None,
    biases: bool = True,
    task_type: str | None = None,
    base_name: str | None = None,
    beside: str | os.PathLike[str] | None = None,
) -> Extraction:
    """Write the difference of two models as a RoCoFT adapter into the folder `out`.

    All linear layers are looked at but the output layer of a language model; those that are equal in both are left alone. A
    classifier that differs is saved whole, as training one would.

    Args:
        base: the model before, with dense weights.
        tuned: the model after; a classifier of its own may have another size.
        out: a new or empty folder.
        mode: ``row``, ``column``, ``row+column`` or ``entry``.
        r: how many rows or columns of each weight at most; None takes all that changed.
        density: for ``entry``: the share of entries of each weight.
        biases: take the changes of the linear layers' biases along.
        task_type: peft's, such as ``SEQ_CLS``.
        base_name: what the adapter is to call its base; None takes what `base` was loaded from.
        beside: a folder whose task and tokenizer come along, such as that of `tuned`.

    Raises:
        UserError: an argument is not allowed; the models are of different shapes (the first parameter is named), quantized, or equal.
    """
    _check_arguments(mode, r, density)
    check_new_folder(out)
    linear = _linear_layers(base)
    tensors: dict[str, Tensor] = {}
    norms: dict[str, tuple[float, float]] = {}
    prints: dict[str, WeightPrint] = {}
    indices: dict[str, Any] = {}
    taken: set[str] = set()
    others = dict(tuned.named_modules())
    with torch.no_grad():
        for name, module in linear.items():
            before, after = _weight(module), _weight(_same(name, module, others))
            change = (after.double() - before.double()).float()
            if not change.any():
                continue
            found = _nearest(change, mode, r, density)
            norms[name] = torch.linalg.vector_norm(change).item(), residual(change, found)
            own = tensors_of(found)
            tensors |= {f"{KEY_PREFIX}{name}.{key}": tensor for key, tensor in own.items()}
            indices[name] = _indices(own, mode)
            taken.add(f"{name}.weight")
            print_ = fingerprint(module, own)
            if print_ is not None:
                prints[name] = print_
        if biases:
            for name in norms:
                changed = _bias_change(linear[name], others[name])
                if changed is not None:
                    tensors[f"{KEY_PREFIX}{name}.{BIAS}"] = changed
                    taken.add(f"{name}.bias")
        saved = _changed_heads(base, tuned)
        left_out = _changes(base, tuned, taken | saved.keys())
    if not norms:
        raise UserError("no linear layer differs between the two models, so there is nothing to extract")
    tensors |= {f"{KEY_PREFIX}{name}": tensor for name, tensor in saved.items()}
    config = {
        "peft_type": "ROCOFT",
        "task_type": task_type,
        "base_model_name_or_path": base_name or getattr(base, "name_or_path", None) or None,
        "mode": mode,
        "r": 1 if mode == "entry" else max(t.shape[-1] for key, t in tensors.items() if key.endswith("_index")),
        "density": density,
        "indices": None if mode == "entry" else indices,
        "bias": "rocoft_only" if any(key.endswith(BIAS) for key in tensors) else "none",
        "target_modules": sorted(norms),
        "target_parameters": [],
        "modules_to_save": sorted({name.split(".")[0] for name in saved}) or None,
        "inference_mode": True,
    }
    described = {"name_or_path": config["base_model_name_or_path"], "class": type(base).__name__}
    if saved:
        described["head"] = {"id2label": tuned.config.id2label, "problem_type": tuned.config.problem_type}
    provenance = {"operation": "extract", "tuned": getattr(tuned, "name_or_path", None), "mode": mode, "r": r}
    write_derived_adapter(
        out,
        config,
        tensors,
        base=described,
        prints=prints,
        provenance=provenance,
        beside=None if beside is None else Path(beside),
    )
    return Extraction(Path(out), norms, left_out, sorted(saved))


def _check_arguments(mode: str, r: Any, density: Any) -> None:
    if mode not in MODES:
        raise UserError(f"mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}{near_matches(mode, MODES)}")
    if r is not None and not is_count(r):
        raise UserError(
            f"r is {r!r}; it must be a whole number of rows or columns, 1 or more, or None for all that changed"
        )
    if mode == "row+column" and r is None:
        raise UserError(
            "r is None; mode 'row+column' needs a number, because all that changed are rows alone, or columns alone"
        )
    if mode == "entry" and r is not None:
        raise UserError(f"r is {r!r}, but mode 'entry' takes single entries: give density")
    if mode != "entry" and density is not None:
        raise UserError(f"density is {density!r}, but mode {mode!r} takes whole rows or columns: give r")
    if mode == "entry" and not (is_number(density) and 0 < density <= 1):
        raise UserError(
            f"density is {density!r}; mode 'entry' needs the share of entries to take, above 0 and at most 1"
        )


def _linear_layers(model: PreTrainedModel) -> dict[str, Any]:
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not _is_head(name)
    }


def _is_head(name: str) -> bool:
    return name.split(".")[0] in _HEADS


def _weight(module: Any) -> Tensor:
    """(out, in)"""
    if not is_plain(module.weight):
        raise UserError(
            f"the weight of a {type(module).__name__} is quantized or absent: load both models with dense weights"
        )
    weight: Tensor = module.weight.detach()
    return weight.mT if isinstance(module, Conv1D) else weight


def _same(name: str, module: Any, others: dict[str, nn.Module]) -> Any:
    other: Any = others.get(name)
    weight = getattr(other, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != module.weight.shape:
        held = (
            "has no such module"
            if other is None
            else f"has {list(weight.shape) if weight is not None else 'no weight'}"
        )
        raise UserError(
            f"module {name!r} has a weight {list(module.weight.shape)} in the base, and the tuned model {held}"
        )
    return other


def _nearest(change: Tensor, mode: str, r: int | None, density: float | None) -> Change:
    if mode == "entry":
        n = entries.count(change.shape[0], change.shape[1], density or 0.0)
        found = best_entries(change, n)
        return _filled(found, change, n)
    if mode == "row":
        return best_rows(change, r)
    return best_columns(change, r) if mode == "column" else best_rows_and_columns(change, r or 1)


def _filled(found: Change, change: Tensor, n: int) -> Change:
    """As many entries as the density says: further ones that change by zero."""
    held = torch.zeros(0, dtype=torch.int64) if found.entry is None else found.entry[1]
    index = torch.cat((held, unused(held, n))).sort().values
    return Change(entry=(change.flatten()[index], index))


def _indices(own: dict[str, Tensor], mode: str) -> Any:
    named = {part: own[f"rocoft_{part}_index"].tolist() for part in MODES[mode] if f"rocoft_{part}" in own}
    return named if mode == "row+column" else named[mode]


def _bias_change(module: Any, other: Any) -> Tensor | None:
    if module.bias is None or torch.equal(module.bias, other.bias):
        return None
    return (other.bias.detach().double() - module.bias.detach().double()).float()


def _changed_heads(base: PreTrainedModel, tuned: PreTrainedModel) -> dict[str, Tensor]:
    """Classifiers that differ, whole."""
    before = dict(base.named_parameters())
    after = {name: parameter for name, parameter in tuned.named_parameters() if _is_head(name)}
    differ = any(name not in before or not _is_equal(before[name], p) for name, p in after.items())
    return {name: parameter.detach().float() for name, parameter in after.items()} if differ else {}


def _changes(base: PreTrainedModel, tuned: PreTrainedModel, taken: set[str]) -> dict[str, float]:
    """Norms of the changes of all parameters that differ beside those that were taken."""
    before = dict(base.named_parameters())
    found = {}
    for name, parameter in tuned.named_parameters():
        if name in taken or (name in before and _is_equal(before[name], parameter)):
            continue
        if name not in before or before[name].shape != parameter.shape:
            found[name] = torch.linalg.vector_norm(parameter.detach().float()).item()
        else:
            found[name] = torch.linalg.vector_norm(parameter.detach().float() - before[name].detach().float()).item()
    return found


def _is_equal(mine: Tensor, other: Tensor) -> bool:
    return mine.shape == other.shape and torch.equal(mine, other)
