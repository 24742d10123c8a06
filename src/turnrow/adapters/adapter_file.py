"""An adapter in memory, as it was read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from turnrow.adapters.fingerprint import WeightPrint
from turnrow.adapters.folder import Tensors, lies_beside, split_by_module
from turnrow.adapters.manifest import MANIFEST_NAME, weight_prints

__all__ = ["AdapterFile"]


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter folder."""

    path: Path
    """The folder."""

    config: dict[str, Any]
    """``adapter_config.json``."""

    tensors: dict[str, torch.Tensor]
    """``adapter_model.safetensors``: tensors by their full key."""

    manifest: dict[str, Any] | None
    """``turnrow.json``; None for an adapter that another program wrote."""

    @property
    def method(self) -> str:
        """The `peft_type`: ``ROCOFT``, ``ROAD``, ``LORA`` ..."""
        return self.config["peft_type"]

    @property
    def lies_beside(self) -> bool:
        """Whether it changes no weight and no layer: prompts and prefixes, which are tokens put before the text."""
        return lies_beside(self.method)

    @property
    def base_name(self) -> str | None:
        """Folder or Hub id of the base, as far as the adapter says."""
        recorded = self.manifest["base"].get("name_or_path") if self.manifest else None
        return self.config.get("base_model_name_or_path") or recorded

    @cached_property
    def _split(self) -> Tensors:
        return split_by_module(self.method, self.tensors)

    @property
    def modules(self) -> dict[str, dict[str, torch.Tensor]]:
        """The adapter's own tensors: ``{module: {parameter: tensor}}``."""
        return self._split.modules

    @cached_property
    def fused_weights(self) -> list[str]:
        """Those of `modules` that are fused weights of experts, by name of the parameter (RoCoFT): their indices are (E, r)."""
        return [
            name
            for name, tensors in self.modules.items()
            if any(parameter.endswith("_index") and tensor.ndim == 2 for parameter, tensor in tensors.items())
        ]

    @property
    def saved_modules(self) -> dict[str, torch.Tensor]:
        """Tensors of modules trained whole (`modules_to_save`, such as a classifier), by parameter name."""
        return self._split.saved

    @property
    def shared(self) -> dict[str, torch.Tensor]:
        """What the adapted modules have in common, trained or only drawn (VeRA's projections), by parameter name."""
        return self._split.shared

    @cached_property
    def base_prints(self) -> dict[str, WeightPrint]:
        """Fingerprints of the base by module; empty without a manifest."""
        return {} if self.manifest is None else weight_prints(self.manifest, self.path / MANIFEST_NAME)

    def non_finite(self) -> dict[str, int]:
        """How many values are NaN or infinite, by tensor key; tensors without any are left out."""
        counts = {
            key: int((~torch.isfinite(tensor)).sum())
            for key, tensor in self.tensors.items()
            if tensor.is_floating_point()
        }
        return {key: count for key, count in counts.items() if count}
