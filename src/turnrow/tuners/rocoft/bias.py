"""The adapter layer for a bias alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.tuners._dense import dense_linear, features
from turnrow.tuners._passthrough import AttributesOfBase
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.rocoft.mixed import add_bias, stack_bias

__all__ = ["RocoftBias"]


class RocoftBias(AttributesOfBase, RocoftLayer):
    """Any module whose bias is trained and whose weight is not, for `bias="all"`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RocoftConfig) -> None:
        super().__init__(base_layer, adapter_name)
        # peft's layers all tell their features; a norm has as many of both as its bias has values.
        size, dense = self._base.bias.numel(), dense_linear(self._base)
        channels = getattr(self._base, "in_channels", size)
        self.out_features, self.in_features = features(dense) if dense is not None else (size, channels)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RocoftConfig) -> None:
        """Add an adapter: a difference of zero to the bias."""
        self._add_bias(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer with the biases of the active adapters, or in a mixed batch of each sample's own."""
        batch = self._slot.batch
        if batch is not None and not self._disable_adapters:
            y = self.base_layer(*args, **kwargs)
            bias = batch.stacked(self, y.dtype)
            return y if bias is None else add_bias(y, bias, self._base, batch)
        if self.disable_adapters and self.merged:
            self.unmerge()
        biases = () if self.disable_adapters or self.merged else self.active.biases
        return self._call_base(biases, args, kwargs)

    def stack_adapters(self, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
        """The trained difference to the bias for each sample."""
        biases: Any = self.rocoft_bias
        return stack_bias(biases, names, dtype)
