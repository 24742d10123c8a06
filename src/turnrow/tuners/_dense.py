"""Linear layers with a dense weight, whichever way round they store it."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["dense_linear", "dense_weight", "features", "is_plain_tensor", "may_change_in_place"]

DenseLinear = nn.Linear | Conv1D


def dense_linear(module: nn.Module) -> DenseLinear | None:
    """The linear layer in `module`, itself or under adapter layers; None if it is no such layer.

    Dense means a floating-point weight: quantized layers are subclasses of torch.nn.Linear, but theirs is of integers.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, (nn.Linear, Conv1D)) and base.weight.is_floating_point():
        return base
    return None


def features(layer: DenseLinear) -> tuple[int, int]:
    """(out_features, in_features)."""
    out_features, in_features = dense_weight(layer).shape
    return out_features, in_features


def dense_weight(layer: DenseLinear, *, values: bool = False) -> Tensor:
    """The weight as (out, in), a view; GPT-2's Conv1D stores it as (in, out).

    Args:
        values: leave autograd out: writing to the result changes the weight, but not its version counter.
    """
    weight = layer.weight.data if values else layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def is_plain_tensor(weight: Tensor) -> bool:
    """Whether the values of `weight` are all here: no sharded or quantized subclass, nothing on the meta device."""
    return type(weight) in (Tensor, nn.Parameter) and weight.device.type != "meta"


def may_change_in_place(weight: Tensor, *, dimensions: int) -> bool:
    """Whether a base weight may hold an adapter's change itself: a dense frozen one, outside `torch.func` and `torch.compile`."""
    return (
        not torch.compiler.is_compiling()
        and is_plain_tensor(weight)
        and weight.is_floating_point()
        and weight.dim() == dimensions  # FSDP flattens what it shards
        and not weight.requires_grad  # a weight that is trained itself must keep its own gradient
        and not weight.is_inference()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
