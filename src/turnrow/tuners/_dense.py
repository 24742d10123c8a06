"""Linear layers with a dense weight, whichever way round they store it."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.errors import UserError

__all__ = ["dense_linear", "dense_weight", "features", "is_plain_tensor", "is_sharded", "refuse_sharded"]

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


def is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed's ZeRO-3 keeps the weight of `layer` in pieces on several processes.

    Inside a forward such a weight looks like any other: it was gathered for the moment, into memory that is given back
    afterwards, and whatever is written there is lost.
    """
    # Asked at every forward: `getattr` for what a module lacks takes ten times as long.
    return layer.__dict__.get("_is_fsdp_managed_module", False) or hasattr(layer._parameters.get("weight"), "ds_id")


def refuse_sharded(layer: nn.Module) -> None:
    """Raise UserError where the values of a sharded weight are asked for."""
    if is_sharded(layer):
        raise UserError(
            "the base weights are sharded over several processes (FSDP or ZeRO-3) and cannot be read or changed in place. "
            "To merge, save the adapter and run `turnrow merge` on it. A model that has run before it is sharded must let go "
            "of its adapter first: `with model.disable_adapter(): pass`"
        )
