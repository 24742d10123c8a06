"""Merging RoAd adapters into the weight and bias of a layer, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft import RoadConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from turnrow.ops import rotation
from turnrow.ops.rounding import MergeCost
from turnrow.tuners._dense import dense_weight, refuse_sharded
from turnrow.tuners._quantized import Original, Requantizer, replace_weight, restore_weight, values_of
from turnrow.tuners.road.tensors import TensorLayer

__all__ = ["MergingLayer"]


class MergingLayer(TensorLayer):
    """A layer that can leave its adapters in the weight until they are taken out again."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: RoadConfig, requantize: Requantizer | None = None
    ) -> None:
        super().__init__(base_layer, adapter_name, config, requantize)
        self._kept_for_unmerge: dict[str, tuple[Tensor, Tensor | None]] = {}
        """Original weight and bias of merged adapters whose rotation cannot be undone (a scale of zero)."""
        self._replaced: list[tuple[Original, Tensor | None]] = []
        """Quantized weights, and biases, that merging has replaced."""
        self.merge_cost: MergeCost | None = None
        """What merging into a quantized weight has cost; None where nothing is merged, or the weight is dense."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergingLayer:
        super()._apply(fn, recurse)
        for original, _ in self._replaced:
            original.apply(fn)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold R into the weight and bias, elementwise, until `unmerge`.

        Args:
            safe_merge: refuse an adapter with NaN or infinite values, before anything is written.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; names the adapter.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self._available_adapters]
        for name in names if safe_merge else ():
            if not all(torch.isfinite(entry).all() for entry in self._blocks(name)[0]):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.quantization_backend is not None:
            self._merge_quantized(names)
            return
        for name in names:
            blocks, invertible = self._blocks(name)
            weight, bias = self._weight_values(), self._bias_values()
            if not invertible:
                self._kept_for_unmerge[name] = (weight.clone(), None if bias is None else bias.clone())
            rotation.rotate_weight_(weight, bias, blocks)
            self.merged_adapters.append(name)

    def _merge_quantized(self, names: list[str]) -> None:
        """All adapters at once: the weight is quantized anew only once."""
        if not names:
            return
        values, bias = values_of(self), self._bias_values()
        rotated_bias = None if bias is None else bias.clone()
        for name in names:
            rotation.rotate_weight_(values, rotated_bias, self._blocks(name)[0])
        original, self.merge_cost = replace_weight(self, values)
        self._replaced.append((original, None if bias is None else bias.clone()))
        self._put_bias(rotated_bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Undo `merge`, last adapter first: by the closed-form inverse, exact up to rounding in the weight's dtype.

        A quantized weight is put back as it was, bit for bit.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self._replaced:
            original, kept_bias = self._replaced.pop()
            restore_weight(self, original)
            self._put_bias(kept_bias)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name not in self._available_adapters or self.quantization_backend is not None:
                continue
            weight = self._weight_values()
            if name in self._kept_for_unmerge:
                kept_weight, kept_bias = self._kept_for_unmerge.pop(name)
                weight.copy_(kept_weight)
                self._put_bias(kept_bias)
            else:
                rotation.unrotate_weight_(weight, self._bias_values(), self._blocks(name)[0])
        self.merge_cost = None

    def dense_values(self) -> Tensor:
        """The weight as it is at this moment, (out, in), to read: a dense one itself, of a quantized one a float32 copy."""
        return self._weight_values() if self.quantization_backend is None else values_of(self)

    def _weight_values(self) -> Tensor:
        """Values of the dense weight as (out, in), to read and to write."""
        refuse_sharded(self._dense)
        return dense_weight(self._dense, values=True)

    def _bias_values(self) -> Tensor | None:
        """Values of the bias, to write to."""
        bias: Tensor | None = getattr(self._dense, "bias", None)
        return None if bias is None else bias.data

    def _put_bias(self, kept: Tensor | None) -> None:
        bias = self._bias_values()
        if bias is not None and kept is not None:
            bias.copy_(kept)
