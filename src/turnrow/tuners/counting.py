"""Exact parameter counts of a model."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from turnrow.tuners._dense import features
from turnrow.tuners._quantized import quantization_backend

__all__ = ["ParameterCount", "count_parameters"]


class ParameterCount(NamedTuple):
    """Numbers of scalars in a model."""

    trainable: int
    """Everything an optimizer would change: adapter weights, trained biases, heads."""

    total: int
    """All parameters and all buffers, each tensor counted once however many names it has, quantized weights as if dense."""

    @property
    def percent(self) -> float:
        """Trainable share of the total, in percent; 0 for an empty model."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.3f} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of `model`; works on the meta device too, so a count needs no weights.

    Example:
        >>> with torch.device("meta"):
        ...     model = AutoModel.from_config(AutoConfig.from_pretrained(path))
        >>> count_parameters(get_peft_model(model, RocoftConfig(r=3)))
    """
    parameters = list(model.parameters())
    sizes = {id(p): p.numel() for p in parameters}
    for module in model.modules():
        packed = next((p for name, p in module.named_parameters(recurse=False) if name != "bias"), None)
        if packed is not None and quantization_backend(module) is not None:
            sizes[id(packed)] = math.prod(features(module))  # two weights of four bits lie in one byte
    return ParameterCount(
        trainable=sum(sizes[id(p)] for p in parameters if p.requires_grad),
        total=sum(sizes.values()) + sum(b.numel() for b in model.buffers()),
    )
