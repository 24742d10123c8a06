"""Merge an adapter into its base: a plain transformers model, with no trace of peft."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from turnrow.adapters.fingerprint import is_plain, weight_shape
from turnrow.adapters.loading import load_adapter
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import new_folder
from turnrow.errors import UserError
from turnrow.ops.rounding import MergeCost

__all__ = ["MergeResult", "layer_values", "merge_adapter"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge changed."""

    path: Path
    """The folder of the merged model."""

    changes: dict[str, tuple[float, float]]
    """By module: Frobenius norms of the change (weight and bias), and of what was there before."""

    replaced: list[str]
    """Parameters that the adapter brought whole, such as a classifier's."""

    costs: dict[str, MergeCost] = field(default_factory=dict)
    """By module: what quantizing the merged weight anew has cost, where the base is quantized."""

    unread: list[str] = field(default_factory=list)
    """Modules with a quantized weight under a method that does not read it; they are left out of `changes`."""

    @property
    def cost(self) -> MergeCost:
        """`costs` of all modules as if they were one."""
        return MergeCost.sum(self.costs.values())

    @property
    def change_norm(self) -> float:
        """Norm of the change over all modules."""
        return math.hypot(*(change for change, _ in self.changes.values()))

    @property
    def relative_change(self) -> float:
        """`change_norm` over the norm of the changed modules before."""
        before = math.hypot(*(norm for _, norm in self.changes.values()))
        return self.change_norm / before if before else 0.0


def merge_adapter(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    processor: Any | None = None,
    check_base: bool = True,
) -> MergeResult:
    """Merge the adapter in `path` into `model` in memory and save the result to `out`, all of it or nothing.

    Costs the model plus one weight in memory. The weights keep the dtype of `model`. Quantized ones are quantized anew, and the
    result says what that has cost; of those the originals stay in memory until the end.

    Args:
        model: the base model; it holds the merged weights afterwards.
        path: the adapter's folder.
        out: a new or empty folder.
        processor: a tokenizer or processor to save beside the model.
        check_base: as in `load_adapter`.

    Raises:
        UserError: as `load_adapter`; `out` is not empty; a merged weight overflows the base's dtype; the base is quantized in a
            way that nothing can be merged into.
    """
    with new_folder(out) as folder:
        replaced = sorted(read_adapter(path).saved_modules)
        adapted = load_adapter(model, path, check_base=check_base)
        tuner: Any = adapted.base_model
        tuner._check_merge_allowed()  # before the first weight is written
        changes, costs, unread = _merge_layers(adapted)
        merged = _unload(adapted)
        merged.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    return MergeResult(Path(out), changes, replaced, costs, unread)


def _merge_layers(model: PeftModel) -> tuple[dict[str, tuple[float, float]], dict[str, MergeCost], list[str]]:
    """Merge layer by layer, so that only one weight at a time is held twice to measure its change."""
    changes, costs, unread = {}, {}, []
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer) or not layer.adapter_layer_names:
            continue  # a module with fused experts leaves it to the layers of its weights
        # nothing has run through the model since the adapter was loaded, so even a RoCoFT layer still holds W0
        before = layer_values(layer)
        layer.merge()
        cost = getattr(layer, "merge_cost", None)
        if cost is not None:
            costs[name] = cost
        if before is None:
            unread.append(name)
            continue
        after = layer_values(layer, copy=False) or {}
        change = _norm({key: after[key].float() - before[key].float() for key in before})
        if not math.isfinite(change):
            raise UserError(f"merging gives NaN or infinite values in {name!r}: load the base in a wider dtype")
        changes[name] = (change, _norm(before))
    return changes, costs, unread


def _unload(model: PeftModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        # peft says this of the layers that were merged one by one, and the tuner what the caller gets to know anyway
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        warnings.filterwarnings("ignore", message="merging has rounded")
        return model.merge_and_unload()


def layer_values(layer: BaseTunerLayer, *, copy: bool = True) -> dict[str, torch.Tensor] | None:
    """Weight and bias under an adapter layer; None where the weight is quantized and the layer does not read it."""
    base = layer.get_base_layer()
    parameters = {key: p.detach() for key, p in base.named_parameters(recurse=False) if is_plain(p)}
    if weight_shape(base) is not None and "weight" not in parameters:
        if not hasattr(layer, "dense_values"):
            return None
        parameters["weight"] = layer.dense_values()
    return {key: p.clone() if copy else p for key, p in parameters.items()}


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in tensors.values()))
