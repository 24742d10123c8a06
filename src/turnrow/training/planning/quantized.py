"""A quantized base in a plan: the bytes of its packed weights, and steps that unpack them for a moment.

Sizes are those of bitsandbytes 0.50 and torchao 0.18. Which linear layers are quantized is decided as transformers decides it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from turnrow.errors import UserError
from turnrow.training.base import head_modules
from turnrow.training.skeleton import Skeleton
from turnrow.tuners.rocoft.layer import RocoftLayer

__all__ = ["QuantizedLinear", "quantize_skeleton", "treat_as_quantized", "unpacked_bytes"]

# bitsandbytes in 4 bits: float32 scales of 64 weights and a table of 16; or the scales in 8 bits, with scales of 256 of them.
_BLOCK_4_BIT, _TABLE_4_BIT = 64, 64
_BLOCK_OF_SCALES, _TABLE_OF_SCALES = 256, 1024 + 4
_GROUP_INT4 = 32


class QuantizedLinear(nn.Linear):
    """A linear layer that holds its weight packed and unpacks it for each forward and each backward.

    The weight is there in full, so that adapters see what they know; `packed_bytes` says what it takes.
    """

    packed_bytes: int
    keeps_input: bool
    """Whether the product keeps its input for the backward, which the int8 product of bitsandbytes does."""

    def forward(self, x: Tensor) -> Tensor:
        """As in torch."""
        return _UnpackedProduct.apply(x, self.weight, self.bias, self.keeps_input)


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.weight, ctx.dtype, ctx.kept = weight, x.dtype, x if keeps_input else None
        return linear(x, weight.clone(), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (dy @ ctx.weight.to(dy.dtype, copy=True)).to(ctx.dtype), None, None, None


def quantize_skeleton(skeleton: Skeleton, quantization: str | Mapping[str, Any] | None) -> None:
    """Make those layers of a base `QuantizedLinear` that `Recipe.quantization` would quantize.

    Raises:
        UserError: the bytes of this quantization are not known here.
    """
    if quantization is None:
        return
    _check_known(quantization)
    model: Any = skeleton.model
    skipped = quantization.get("llm_int8_skip_modules") if isinstance(quantization, Mapping) else None
    left_out = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    heads = head_modules(model, skeleton.new_modules)
    for name, module in model.named_modules():
        in_head = any(name == head or name.startswith(f"{head}.") for head in heads)
        if type(module) is nn.Linear and should_convert_module(name, left_out) and not in_head:
            layer: Any = module
            layer.__class__ = QuantizedLinear
            layer.packed_bytes = _packed_bytes(layer.weight, quantization)
            layer.keeps_input = _is_int8_product(quantization)


def unpacked_bytes(model: nn.Module) -> int:
    """How much more the weights of `model` take as they stand there than they would packed."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(layer.weight.nbytes - layer.packed_bytes for layer in layers)


def treat_as_quantized(model: nn.Module) -> None:
    """Have the RoCoFT layers on quantized weights write nothing into them."""
    for module in model.modules():
        if isinstance(module, RocoftLayer) and isinstance(module.get_base_layer(), QuantizedLinear):
            module.weight_is_shared = True


def _check_known(quantization: str | Mapping[str, Any]) -> None:
    if isinstance(quantization, Mapping) and not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        raise UserError(
            f"quantization is {dict(quantization)!r}; plan knows how much memory nf4, int8, torchao_int8, torchao_int4 and "
            "mappings for bitsandbytes (load_in_4bit, load_in_8bit) take, no others: leave quantization out to plan for the "
            "base as it is"
        )


def _is_int8_product(quantization: str | Mapping[str, Any]) -> bool:
    return quantization == "int8" or (isinstance(quantization, Mapping) and bool(quantization.get("load_in_8bit")))


def _packed_bytes(weight: Tensor, quantization: str | Mapping[str, Any]) -> int:
    """Of a weight with its scales and tables."""
    rows, count = weight.shape[0], weight.numel()
    if quantization == "torchao_int8":
        return count + 5 * rows  # a scale and a zero point a row
    if quantization == "torchao_int4":
        # Held in whole bytes.
        return count + count // _GROUP_INT4 * (weight.element_size() + 1)
    if _is_int8_product(quantization):
        return count + 4 * rows
    blocks = math.ceil(count / _BLOCK_4_BIT)
    double = isinstance(quantization, Mapping) and bool(quantization.get("bnb_4bit_use_double_quant"))
    scales = blocks + 4 * math.ceil(blocks / _BLOCK_OF_SCALES) + _TABLE_OF_SCALES if double else 4 * blocks
    return math.ceil(count / 2) + scales + _TABLE_4_BIT
