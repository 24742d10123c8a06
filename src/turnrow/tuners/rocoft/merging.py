"""Merging RoCoFT adapters into the weight of a layer, and taking them out again.

Merging into a quantized weight quantizes W0 + delta anew, and `merge_cost` says what was lost by it; unmerging puts back the
quantized weight that was there.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from turnrow.ops.delta import adapted
from turnrow.ops.rounding import MergeCost
from turnrow.tuners._quantized import Original, Requantizer, replace_weight, restore_weight, values_of
from turnrow.tuners.rocoft.live import Kept, LiveLayer
from turnrow.tuners.rocoft.parts import Part

__all__ = ["MergingLayer"]


class MergingLayer(LiveLayer):
    """A layer that can leave its adapters in the weight until they are taken out again."""

    def __init__(self, base_layer: Any, adapter_name: str, requantize: Requantizer | None = None) -> None:
        super().__init__(base_layer, adapter_name, requantize)
        self._merged: list[Kept] = []
        self.merge_cost: MergeCost | None = None
        """What merging into a quantized weight has cost; None where nothing is merged, or the weight is dense."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave W0 + delta of the adapters in the weight (and bias), until `unmerge`.

        Args:
            safe_merge: refuse an adapter with NaN or infinite values, before anything is written.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; names the adapter.
        """
        self.restore_base()
        trained = {
            name: (self.parts(name), [self._bias_part(name)] if name in self.rocoft_bias else [])
            for name in check_adapters_to_merge(self, adapter_names)
        }
        for name, (parts, biases) in trained.items() if safe_merge else ():
            if not all(torch.isfinite(part.parameter).all() for part in parts + biases):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.quantization_backend is not None:
            self._merge_quantized([part for parts, _ in trained.values() for part in parts])
        for parts, biases in trained.values():
            self._merge_parts(biases if self.quantization_backend is not None else parts + biases)
        self.merged_adapters.extend(name for name, (parts, biases) in trained.items() if parts or biases)

    def _merge_parts(self, parts: list[Part]) -> None:
        originals = [self._take_out(part) for part in parts]  # all before the first is written: rows and columns cross
        for part, kept in zip(parts, originals, strict=True):
            self._merged.append(kept)
            self._write(kept, adapted(kept.values, part.delta().detach()))

    def _merge_quantized(self, parts: list[Part]) -> None:
        """All parts of all adapters at once: the weight is quantized anew only once."""
        if not parts:
            return
        with torch.no_grad():
            values = values_of(self)
            for part in parts:
                part.ops.put_(values, part.index, adapted(part.ops.keep(values, part.index), part.delta()))
            original, self.merge_cost = replace_weight(self, values)
        self._merged.append(Kept("weight", None, original))

    def unmerge(self) -> None:
        """Put back what merging replaced, last first: the base is bit-identical to what it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self._merged:
            kept = self._merged[-1]
            if isinstance(kept.values, Original):
                restore_weight(self, kept.values)
            else:
                self._write(kept, kept.values)
            self._merged.pop()
        self.merged_adapters.clear()
        self.merge_cost = None
