"""Exact parameter counts of a model."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = ["ParameterCount", "count_parameters"]


class ParameterCount(NamedTuple):
    """Numbers of scalars in a model."""

    trainable: int
    """Everything an optimizer would change: adapter weights, trained biases, heads."""

    total: int
    """All parameters and all buffers, each tensor counted once however many names it has."""

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
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters) + sum(b.numel() for b in model.buffers()),
    )
