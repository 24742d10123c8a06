"""Linear layers with a dense weight, whichever way round they store it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from turnrow.errors import UserError

__all__ = [
    "bare",
    "dense_linear",
    "dense_weight",
    "features",
    "is_plain_tensor",
    "is_rehearsal",
    "is_sharded",
    "is_torchao",
    "may_change_in_place",
    "refuse_sharded",
    "rehearsal",
]

DenseLinear = nn.Linear | Conv1D

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)


def bare(module: nn.Module) -> nn.Module:
    """What lies under adapter layers, or `module` itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def dense_linear(module: nn.Module) -> DenseLinear | None:
    """The linear layer in `module`, itself or under adapter layers; None if it is no such layer.

    Dense means a floating-point weight: quantized layers are subclasses of torch.nn.Linear too, but their weight is of
    integers, or of torchao's tensors, which pass themselves off as floating-point.
    """
    base = bare(module)
    if isinstance(base, (nn.Linear, Conv1D)) and base.weight.is_floating_point() and not is_torchao(base.weight):
        return base
    return None


def features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of the linear layer in `module`, dense or quantized."""
    dense = dense_linear(module)
    if dense is not None:
        out_features, in_features = dense_weight(dense).shape
        return out_features, in_features
    # packed into another shape than the matrix it stands for
    sizes: Any = _get_in_out_features(bare(module))
    return sizes[1], sizes[0]


def dense_weight(layer: DenseLinear, *, values: bool = False) -> Tensor:
    """The weight as (out, in), a view; GPT-2's Conv1D stores it as (in, out).

    Args:
        values: leave autograd out: writing to the result changes the weight, but not its version counter.
    """
    weight = layer.weight.data if values else layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def is_plain_tensor(weight: Tensor) -> bool:
    """Whether the values of `weight` are all here: no sharded or quantized subclass, nothing on the meta device."""
    if is_rehearsal() and isinstance(weight, FakeTensor):
        return True
    return type(weight) in (Tensor, nn.Parameter) and weight.device.type != "meta"


@contextmanager
def rehearsal() -> Iterator[None]:
    """In this block a FakeTensor passes for a weight that is here.

    A forward and backward on fake tensors then goes through the same steps, and takes the same bytes, as training does;
    otherwise layers treat a weight without values as one that is elsewhere. What is chosen by data passes for chosen.
    """
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def is_rehearsal() -> bool:
    """Whether this is a `rehearsal`."""
    return _rehearsing.get()


def is_sharded(layer: nn.Module, parameter: str = "weight") -> bool:
    """Whether FSDP or DeepSpeed's ZeRO-3 keeps a parameter of `layer` in pieces on several processes.

    Inside a forward such a weight looks like any other: it was gathered for the moment, into memory that is given back
    afterwards, and whatever is written there is lost.
    """
    # Asked at every forward: `getattr` for what a module lacks takes ten times as long.
    return layer.__dict__.get("_is_fsdp_managed_module", False) or hasattr(layer._parameters.get(parameter), "ds_id")


def refuse_sharded(layer: nn.Module, parameter: str = "weight") -> None:
    """Raise UserError where the values of a sharded weight are asked for."""
    if is_sharded(layer, parameter):
        raise UserError(
            "the base weights are sharded over several processes (FSDP or ZeRO-3) and cannot be read or changed in place. "
            "To merge, save the adapter and run `turnrow merge` on it. A model that has run before it is sharded must let go "
            "of its adapter first: `with model.disable_adapter(): pass`"
        )


def is_torchao(weight: Any) -> bool:
    """Whether `weight` is quantized by torchao; asked of the type's name, because importing torchao takes seconds."""
    return type(weight).__module__.startswith("torchao.")


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
