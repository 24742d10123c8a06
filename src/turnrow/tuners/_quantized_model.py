"""What a tuner does about quantized weights in its model, beyond what its layers do."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from turnrow.errors import UserError
from turnrow.ops.rounding import MergeCost
from turnrow.tuners._dense import features
from turnrow.tuners._quantized import quantization_backend, why_not_to_merge

__all__ = ["QuantizedModelMixin", "dequantize", "keep_nf4_unpacked", "warn_of_merge_costs"]


class QuantizedModelMixin(BaseTuner):
    """To go before peft's class in the bases of a tuner whose layers have a `quantization_backend` and a `merge_cost`.

    Layers that merge into weights are known by their `dense_values`.
    """

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As in peft; 4-bit weights stay in the form in which gradients go through them."""
        keep_nf4_unpacked(model)
        _warn_of_misread_weights(model)
        super().inject_adapter(model, *args, **kwargs)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in peft; says what it has cost where weights are quantized."""
        super().merge_adapter(*args, **kwargs)
        warn_of_merge_costs(self._layers_with_weights())

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        _check_can_merge(self._layers_with_weights())

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers = self._layers_with_weights()
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        warn_of_merge_costs(layers)
        return unloaded

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, BaseTunerLayer) and new_module is child.get_base_layer():
            setattr(
                parent, child_name, new_module
            )  # peft would ask for a `weight`, which not every quantized layer has
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _layers_with_weights(self) -> dict[str, BaseTunerLayer]:
        """The adapter layers in which something is merged into a weight, by name."""
        return {name: module for name, module in self.model.named_modules() if hasattr(module, "dense_values")}


def _check_can_merge(layers: dict[str, BaseTunerLayer]) -> None:
    """Refuse before anything is merged what cannot be merged (UserError, with the name of the first such layer)."""
    for name, layer in layers.items():
        backend = layer.quantization_backend
        if backend is not None and (reason := why_not_to_merge(backend)):
            raise UserError(f"module {name!r} has {reason}")


def warn_of_merge_costs(layers: dict[str, BaseTunerLayer]) -> None:
    """Say once for the model what merging into its quantized weights has cost, and name the worst of them."""
    costs = {n: cost for n, layer in layers.items() if (cost := getattr(layer, "merge_cost", None)) is not None}
    if costs:
        worst = max(costs, key=lambda name: costs[name].relative)
        warnings.warn(
            f"merging has rounded {len(costs)} quantized weights anew: {MergeCost.sum(costs.values())}; the worst is "
            f"{worst!r}: {costs[worst]}. An adapter kept beside the base loses nothing",
            stacklevel=3,
        )


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Put a dense layer in the place of every quantized one, with the values that it computes with, in the dtype of the model.

    An adapter merges into them without loss. Costs the memory of a dense model; goes layer by layer.

    Raises:
        UserError: the weights are of a kind that cannot be read; names the first such layer.
    """
    dtype = getattr(model, "dtype", torch.float32)
    for name, module in list(model.named_modules()):
        backend = quantization_backend(module)
        if backend is None:
            continue
        layer: Any = module
        try:
            values = backend.get_base_weight(layer)
        except (TypeError, NotImplementedError) as error:
            raise UserError(f"module {name!r} cannot be dequantized: {error}") from error
        out_features, in_features = features(layer)
        bias = getattr(layer, "bias", None)
        dense = nn.Linear(in_features, out_features, bias is not None, device=values.device, dtype=dtype)
        dense.requires_grad_(False).train(layer.training)
        dense.weight.copy_(values)
        if bias is not None:
            dense.bias.copy_(bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


_WRONG = 0.13
"""Relative error of normal values read back from 4 bits, above which they were not read back. Right is 0.09 to 0.1."""


def _warn_of_misread_weights(model: nn.Module) -> None:
    """bitsandbytes 0.50 on CPUs with AVX-512 reads 4-bit rows back wrongly that are not whole blocks long."""
    for name, module in model.named_modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or module.weight.device.type != "cpu" or not hasattr(state, "blocksize"):
            continue
        in_features = state.shape[-1]
        if in_features % state.blocksize and _is_misread(in_features, state.blocksize, state.quant_type):
            warnings.warn(
                f"bitsandbytes reads 4-bit weights with rows of {in_features} values, as that of {name!r}, back wrongly on this CPU: "
                f"the base itself computes something else than its weights say. Rows of a multiple of {state.blocksize} are right, "
                "as are GPUs and other quantizations",
                stacklevel=2,
            )
            return


@cache
def _is_misread(in_features: int, blocksize: int, quant_type: str) -> bool:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.randn(32, in_features, generator=torch.Generator().manual_seed(0))
    read = dequantize_4bit(*quantize_4bit(values, blocksize=blocksize, quant_type=quant_type))
    return bool(torch.dist(read, values) > _WRONG * values.norm())


def keep_nf4_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for CPUs with AVX512-BF16, and unpack those that it has packed.

    It packs a weight at the first forward in evaluation. From then on no gradient goes through that layer, and what is
    read of it is garbage. Costs the speed of that kernel; does nothing on other CPUs and on GPUs. Unpacking does not bring
    back the scales that packing has rounded to bfloat16: best called before the first forward.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                layer.weight.data, layer.weight.quant_state
            )
            layer.quant_state = layer.weight.quant_state
