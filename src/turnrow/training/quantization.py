"""A frozen base whose weights are quantized as it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from turnrow.adapters import needed_package, quantization_config
from turnrow.errors import UserError, near_matches
from turnrow.training.quiet import without_cast_notes
from turnrow.tuners import keep_nf4_unpacked

__all__ = [
    "QUANTIZATIONS",
    "check_quantization",
    "make_quantization",
    "plain_conversion_errors",
    "prepare_quantized",
    "quantization_package",
    "quantized_among",
    "spare",
]

Quantization = str | Mapping[str, Any]

QUANTIZATIONS = ("nf4", "int8", "torchao_int8", "torchao_int4")
"""Those that go by a name; 4 bits come in groups of 64 (nf4) and 32 (torchao_int4) weights with a scale of their own."""

_BITSANDBYTES = ("nf4", "int8", "bitsandbytes")
_GROUP = 32


def check_quantization(value: Any) -> Quantization | None:
    """Return the field ``quantization`` of a recipe, checked as far as that needs no package.

    Raises:
        UserError: an unknown name (with near matches), or neither name nor mapping.
    """
    if value is None or value in QUANTIZATIONS:
        return value
    if isinstance(value, Mapping) and value:
        return deepcopy(dict(value))
    hint = near_matches(str(value), QUANTIZATIONS) or f"; allowed are {', '.join(QUANTIZATIONS)}"
    raise UserError(
        f"quantization is {value!r}{hint}, or a mapping in the words of transformers' quantization_config, such as "
        "{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"
    )


def make_quantization(value: Quantization | None, dtype: torch.dtype) -> QuantizationConfigMixin | None:
    """The quantization of a recipe as transformers takes it.

    Args:
        value: as returned by `check_quantization`.
        dtype: what bitsandbytes computes in over 4-bit weights, where `value` does not say.

    Raises:
        UserError: its package is not installed (names the extra), or transformers refuses the mapping.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        settings = {"bnb_4bit_compute_dtype": dtype, **value} if value.get("load_in_4bit") else value
        return quantization_config(settings)
    needed_package("torchao" if value.startswith("torchao") else "bitsandbytes")
    if value == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if value == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if value == "torchao_int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    four_bits: torch.dtype = torch.int4  # type: ignore[attr-defined]
    return TorchAoConfig(IntxWeightOnlyConfig(four_bits, PerGroup(_GROUP)))


def quantization_package(value: Quantization | None) -> tuple[str, ...]:
    """The package that quantizes, if it is one of those that go by a name here."""
    if value is None:
        return ()
    method = str(value.get("quant_method", "bitsandbytes")) if isinstance(value, Mapping) else value
    return ("torchao",) if method.startswith("torchao") else ("bitsandbytes",) if method in _BITSANDBYTES else ()


@contextmanager
def plain_conversion_errors(name: str, quantization: QuantizationConfigMixin | None) -> Iterator[None]:
    """Say what transformers leaves to a report in its log: a weight could not be quantized (UserError)."""
    try:
        yield
    except RuntimeError as error:
        if quantization is None:
            raise
        raise UserError(
            f"model {name!r} cannot be quantized by {quantization.quant_method.value}: {error}. What goes by groups of weights needs "
            f"linear layers whose input features are a multiple of the group: {_GROUP} for torchao_int4"
        ) from error


def quantized_among(model: PreTrainedModel, modules: Iterable[str]) -> list[str]:
    """Those of `modules` that the quantization of `model` has taken, wholly or in part.

    transformers leaves out the last parameter of a model, which may be a bias, and its weight is quantized then. And what the
    checkpoint does not hold, it quantizes by halves: the layer's class, not the weight.
    """
    skipped = _quantizer(model).modules_to_not_convert
    return [
        name
        for name in modules
        if any(
            isinstance(layer, torch.nn.Linear) and should_convert_module(f"{name}.{inner}".strip("."), skipped)
            for inner, layer in model.get_submodule(name).named_modules()
        )
    ]


def spare(config: QuantizationConfigMixin, model: PreTrainedModel, modules: Iterable[str]) -> QuantizationConfigMixin:
    """The configuration that leaves out `modules` beside what it has left out in `model`."""
    spared = deepcopy(config)
    field = "llm_int8_skip_modules" if isinstance(config, BitsAndBytesConfig) else "modules_to_not_convert"
    setattr(spared, field, sorted({*_quantizer(model).modules_to_not_convert, *modules}))
    return spared


def prepare_quantized(model: PreTrainedModel) -> None:
    """Make a quantized model one that adapters of any method can be trained on.

    Raises:
        UserError: gradients do not go through this quantization.
    """
    keep_nf4_unpacked(model)
    without_cast_notes()
    quantizer = _quantizer(model)
    config = quantizer.quantization_config
    if isinstance(config, TorchAoConfig) and type(config.quant_type).__name__ == "IntxWeightOnlyConfig":
        # transformers lets nothing of torchao but int8 be trained on. The gradient through these is that through the
        # dequantized weight, to the last digit: tests/tuners/test_quantized.py.
        quantizer.__class__ = _trainable(type(quantizer))
    if not quantizer.is_trainable:
        raise UserError(
            f"quantization by {config.quant_method.value} serves for inference only, says transformers; an adapter can be "
            f"trained on {', '.join(QUANTIZATIONS)}"
        )


def _quantizer(model: PreTrainedModel) -> Any:
    return model.hf_quantizer


def _trainable(quantizer: type) -> type:
    return type(f"Trainable{quantizer.__name__}", (quantizer,), {"is_trainable": True})
