"""The adapter layer of RoCoFT for linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turnrow.tuners._dense import features, is_plain_tensor, is_sharded
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.layer import Active, RocoftLayer, trainable_dtype
from turnrow.tuners.rocoft.parts import PARTS, choose_indices

__all__ = ["RocoftLinear"]

_NOISE = 0.1
"""Standard deviation of the random differences that `init_weights=False` starts from."""


class RocoftLinear(RocoftLayer):
    """A linear layer (torch.nn.Linear, or GPT-2's Conv1D) of which rows, columns or entries are trained."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RocoftConfig, name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.out_features, self.in_features = features(self._base)
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: RocoftConfig, name: str) -> None:
        """Add an adapter: delta = 0 for what the config chooses in the module called `name`."""
        weight = self._base.weight
        chosen = choose_indices(config, name, self.out_features, self.in_features)
        for part, index in chosen.items():
            shape = PARTS[part].shape(self.out_features, self.in_features, len(index))
            if part == "column" and "row" in chosen:
                shape = (shape[0] - len(chosen["row"]), shape[1])  # what lies in both is the rows'
            delta = torch.zeros(shape, dtype=trainable_dtype(weight), device=weight.device)
            if not config.init_weights:
                nn.init.normal_(delta, std=_NOISE)
            getattr(self, f"rocoft_{part}")[adapter_name] = nn.Parameter(delta)
            getattr(self, f"rocoft_{part}_index")[adapter_name] = index.to(weight.device)
        if config.bias != "none":
            self._add_bias(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_index(self, adapter_name: str, part: str, index: Tensor) -> None:
        """Choose other rows, columns or entries for an adapter whose difference is still zero.

        Args:
            adapter_name: of an adapter that this layer has.
            part: "row", "column" or "entry".
            index: as many as before, int64; entries ascending.
        """
        self._adapters_change()
        getattr(self, f"rocoft_{part}_index")[adapter_name].copy_(index)

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
        if torch.compiler.is_compiling():
            return False
        base = self.base_layer
        weight: Any = base._parameters.get("weight")
        return (
            weight is not None  # no other adapter layer in between
            and not self.weight_is_shared
            and is_plain_tensor(weight)
            and not is_sharded(base)
            and weight.is_floating_point()
            and weight.dim() == 2  # FSDP flattens what it shards
            and not weight.requires_grad  # a weight that is trained itself must keep its own gradient
            and not weight.is_inference()
            and torch._C._functorch.peek_interpreter_stack() is None
        )
