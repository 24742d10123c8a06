"""Merge an adapter into its base: a plain transformers model, with no trace of peft."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from turnrow.adapters.loading import load_adapter
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import new_folder
from turnrow.errors import UserError

__all__ = ["MergeResult", "merge_adapter"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge changed."""

    path: Path
    """The folder of the merged model."""

    changes: dict[str, tuple[float, float]]
    """By module: Frobenius norms of the change (weight and bias), and of what was there before."""

    replaced: list[str]
    """Parameters that the adapter brought whole, such as a classifier's."""

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

    Costs the model plus one weight in memory. The weights keep the dtype of `model`.

    Args:
        model: the base model; it holds the merged weights afterwards.
        path: the adapter's folder.
        out: a new or empty folder.
        processor: a tokenizer or processor to save beside the model.
        check_base: as in `load_adapter`.

    Raises:
        UserError: as `load_adapter`; `out` is not empty; a merged weight overflows the base's dtype.
    """
    with new_folder(out) as folder:
        replaced = sorted(read_adapter(path).saved_modules)
        adapted = load_adapter(model, path, check_base=check_base)
        changes = _merge_layers(adapted)
        merged = _unload(adapted)
        merged.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    return MergeResult(Path(out), changes, replaced)


def _merge_layers(model: PeftModel) -> dict[str, tuple[float, float]]:
    """Merge layer by layer, so that only one weight at a time is held twice to measure its change."""
    changes = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer) or not layer.adapter_layer_names:
            continue  # a module with fused experts leaves it to the layers of its weights
        # nothing has run through the model since the adapter was loaded, so even a RoCoFT layer still holds W0
        before = _float_parameters(layer)
        layer.merge()
        after = _float_parameters(layer, copy=False)
        change = _norm({key: after[key].float() - before[key].float() for key in before})
        if not math.isfinite(change):
            raise UserError(f"merging gives NaN or infinite values in {name!r}: load the base in a wider dtype")
        changes[name] = (change, _norm(before))
    return changes


def _unload(model: PeftModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        # peft says this of the layers that were merged one by one
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return model.merge_and_unload()


def _float_parameters(layer: BaseTunerLayer, *, copy: bool = True) -> dict[str, torch.Tensor]:
    parameters = layer.get_base_layer().named_parameters(recurse=False)
    return {key: p.detach().clone() if copy else p.detach() for key, p in parameters if p.is_floating_point()}


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in tensors.values()))
