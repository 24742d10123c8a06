"""Linear layers with a quantized weight: read it, write another, put the first back. By peft's quantization backends.

Reading gives what the layer computes with, the dequantized weight. Writing quantizes anew and so loses something of what
is written; `MergeCost` says how much. What is taken out is kept as it is, so putting it back is bit-exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    HqqBackend,
    QuantizationBackend,
    TorchaoBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from turnrow.errors import UserError
from turnrow.ops.rounding import MergeCost, merge_cost
from turnrow.tuners._dense import bare, dense_linear, is_torchao

__all__ = [
    "Original",
    "Requantizer",
    "is_linear",
    "quantization_backend",
    "refuse_cut_gradient",
    "replace_weight",
    "requantizer",
    "restore_weight",
    "values_of",
    "why_not_to_merge",
]

Requantizer = Callable[[], Any]
"""Returns torchao's configuration, with which a weight is quantized anew; the other backends need none."""


def requantizer(model: nn.Module) -> Requantizer | None:
    """How torchao weights of `model` are quantized anew; transformers knows it of the models that it has quantized."""
    return get_quantization_kwargs(model).get("get_apply_tensor_subclass")


def quantization_backend(module: nn.Module, requantize: Requantizer | None = None) -> QuantizationBackend | None:
    """How the weight of the layer in `module`, itself or under adapter layers, is quantized; None if it is not."""
    base = bare(module)
    if dense_linear(base) is not None:
        return None
    if is_torchao(getattr(base, "weight", None)):
        # Not by peft's own search: that of 0.20 looks for classes of torchao that are gone.
        backend = TorchaoBackend(requantize)
        backend.supports_merge = requantize is not None
        return backend
    try:
        return resolve_quantization_backend(base)
    except ImportError:  # the same search, past all that it knows but torchao
        return None


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, dense or quantized, itself or under adapter layers."""
    return dense_linear(module) is not None or quantization_backend(module) is not None


@dataclass
class Original:
    """A quantized weight that was taken out of its layer."""

    module: nn.Module
    """The layer it belongs to. HQQ keeps a weight and its scales in the layer itself, so there the layer is replaced."""

    weight: Any
    """The parameter; None for HQQ."""

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move it as `torch.nn.Module.to` moves what is in the model."""
        if self.weight is None:
            self.module._apply(fn)
        else:
            moved = fn(self.weight)
            self.weight = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)


def values_of(layer: BaseTunerLayer) -> Tensor:
    """The dequantized weight under an adapter layer, (out, in) float32, a copy."""
    return _backend(layer).get_base_weight(layer.get_base_layer()).detach().to(torch.float32, copy=True)


def replace_weight(layer: BaseTunerLayer, values: Tensor) -> tuple[Original, MergeCost]:
    """Quantize `values` into the weight under an adapter layer.

    Args:
        layer: an adapter layer with a `quantization_backend`.
        values: (out, in), float32.

    Returns:
        What was taken out, for `restore_weight`, and what the quantization cost.

    Raises:
        ValueError: what the weight would hold is not finite. The layer is as it was.
        UserError: the backend cannot quantize anew.
    """
    backend = _backend(layer)
    if reason := why_not_to_merge(backend):
        raise UserError(f"this layer has {reason}")
    before = values_of(layer)
    original = _take_out(layer)
    weight = original.weight
    attributes = {} if weight is None else dict(vars(weight))
    try:
        # peft's HQQ backend replaces the layer itself, and that in the adapter layer right above it.
        backend.set_base_weight(_innermost(layer), values.to(weight.dtype) if is_torchao(weight) else values)
        if isinstance(backend, HqqBackend):
            layer.get_base_layer().bias = original.module.bias  # which peft forgets
        cost = merge_cost(values_of(layer), values, before)
        if not math.isfinite(cost.error):
            raise ValueError(f"the merged weight has values that {backend.backend_name} cannot hold")
    except BaseException:
        restore_weight(layer, original)
        raise
    finally:
        if weight is not None:  # peft marks the 4-bit weight that it replaces as not quantized
            vars(weight).update(attributes)
    return original, cost


def restore_weight(layer: BaseTunerLayer, original: Original) -> None:
    """Put back, bit for bit, what `replace_weight` took out."""
    backend = _backend(layer)
    if isinstance(backend, HqqBackend):
        _innermost(layer).base_layer = original.module
        return
    base: Any = original.module
    if "weight" not in base._parameters:  # torchao failed half way
        vars(base).pop("weight", None)
    base.weight = original.weight
    if isinstance(backend, Bnb8bitBackend):
        base.state.reset_grads()  # the next forward takes the scales from the weight
    if isinstance(backend, Bnb4bitBackend):
        base.quant_state = base.weight.quant_state


def refuse_cut_gradient(y: Tensor, x: Tensor, backend: QuantizationBackend) -> None:
    """Raise UserError where the output y of a quantized layer has lost the gradient of its input x.

    Autograd says nothing of it: whatever lies below would go on training with the wrong gradient, or with none.
    """
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
        raise UserError(
            f"no gradient goes through this weight quantized by {backend.backend_name}, so nothing can be trained below it: it is of "
            "a kind for inference only, such as those of torchao that quantize activations too. Load the base as nf4, int8, or "
            "torchao's weight-only kinds; to run an adapter without training, use torch.no_grad()"
        )


def why_not_to_merge(backend: QuantizationBackend) -> str | None:
    """What stands against merging into weights of this kind, to follow "the layer has"; None where nothing does."""
    if backend.supports_merge:
        return None
    why = (
        "it was quantized without transformers, so nothing says how to do it again: load the model by "
        "from_pretrained(..., quantization_config=...)"
        if isinstance(backend, TorchaoBackend)
        else "its package cannot quantize a changed weight anew: load the base without quantization to merge into it"
    )
    return (
        f"a weight quantized by {backend.backend_name}, into which nothing can be merged; {why}. "
        "As an adapter beside the base it works as it is"
    )


def _backend(layer: BaseTunerLayer) -> QuantizationBackend:
    assert layer.quantization_backend is not None
    return layer.quantization_backend


def _innermost(layer: Any) -> Any:
    """The last of several adapter layers around one base layer."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


def _take_out(layer: BaseTunerLayer) -> Original:
    base: Any = layer.get_base_layer()
    backend = _backend(layer)
    if isinstance(backend, HqqBackend):
        return Original(base, None)
    if isinstance(backend, Bnb8bitBackend) and base.weight.SCB is None:
        # Since the first forward the layer's state has the scales: they belong to the weight that goes.
        base.weight.CB, base.weight.SCB = base.weight.data, base.state.SCB
    return Original(base, base.weight)
