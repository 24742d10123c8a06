"""The adapter layer of RoCoFT for linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turnrow.tuners._dense import features, may_change_in_place
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.layer import Active, RocoftLayer
from turnrow.tuners.rocoft.parts import choose_indices, shape_of_part

__all__ = ["RocoftLinear"]


class RocoftLinear(RocoftLayer):
    """A linear layer (torch.nn.Linear, or GPT-2's Conv1D) of which rows, columns or entries are trained."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RocoftConfig, name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.out_features, self.in_features = features(self._base)
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: RocoftConfig, name: str) -> None:
        """Add an adapter: delta = 0 for what the config chooses in the module called `name`."""
        chosen = choose_indices(config, name, self.out_features, self.in_features)
        for part, index in chosen.items():
            shape = shape_of_part(part, chosen, self.out_features, self.in_features)
            self._add_part(adapter_name, config, part, shape, index)
        if config.bias != "none":
            self._add_bias(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the active adapters; which way it goes is decided anew at every call."""
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = self.active
        if len(active.names) == 1 and self._may_go_live():
            return self._live_forward(active, x, args, kwargs)
        self.restore_base()
        y = self._call_base(active.with_bias, (x, *args), kwargs)
        for part in active.parts:
            y = part.ops.overlay(y, x, part.delta(), part.index)
        return y

    def _live_forward(self, active: Active, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        self._go_live(active)
        y = self._call_base(active.with_bias, (x, *args), kwargs)
        if torch.is_grad_enabled():
            for part in active.parts:
                if part.parameter.requires_grad:
                    y = part.ops.attach_gradient(y, x, part.delta(), part.index)
        return y

    def _may_go_live(self) -> bool:
        weight: Any = self.base_layer._parameters.get("weight")
        return (
            weight is not None  # no other adapter layer in between
            and not self.weight_is_shared
            and may_change_in_place(weight, dimensions=2)
        )
