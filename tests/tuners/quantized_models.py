"""The tiny models with their linear layers quantized, as transformers loads them, and the list of backends."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from tests.tuners.models import build
from turnrow.tuners import keep_nf4_unpacked


def _bitsandbytes(**fields: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**fields)


def _torchao(name: str, *arguments: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)(*arguments))


def _torchao_int4() -> Any:
    from torchao.quantization import PerGroup

    return _torchao("IntxWeightOnlyConfig", torch.int4, PerGroup(8))


def _with_hqq(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """By hand, because transformers 5 does not load by HQQ yet."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model.requires_grad_(False)  # it clones the bias, with its history

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            config = BaseQuantizeConfig(nbits=4, group_size=8, axis=1)
            layer = HQQLinear(module, config, compute_dtype=dtype, device="cpu")
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
    return model


SIZES = {"hidden": 64, "intermediate": 128}
"""Multiples of 64: bitsandbytes 0.50 dequantizes 4-bit rows of 48 or 96 values wrongly on CPUs with AVX-512."""

BACKENDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "nf4": ("bitsandbytes", lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "nf4-double": (
        "bitsandbytes",
        lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "int8": ("bitsandbytes", lambda: _bitsandbytes(load_in_8bit=True)),
    "torchao-int8": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao-int4": ("torchao", _torchao_int4),
    "hqq": ("hqq", lambda: None),
}
"""By name: the package it needs, and transformers' configuration."""


def build_quantized(architecture: str, backend: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    """`models.build(architecture)` with quantized linear layers, and inputs.

    Skips the test where the backend's package is not installed.
    """
    package, _ = BACKENDS[backend]
    how = "from its source" if package == "hqq" else "by pip install 'turnrow[quantized]'"
    pytest.importorskip(package, reason=f"needs {package}, {how}")
    return copy.deepcopy(_loaded(architecture, backend, dtype)), build(architecture, SIZES, dtype=dtype)[1]


@cache
def _loaded(architecture: str, backend: str, dtype: torch.dtype) -> nn.Module:
    model, _ = build(architecture, SIZES, dtype=dtype)
    if backend == "hqq":
        return _with_hqq(model, dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, quantization_config=BACKENDS[backend][1](), dtype=dtype)
    loaded.config._name_or_path = loaded.name_or_path = ""  # the folder is gone
    keep_nf4_unpacked(loaded)  # bitsandbytes' kernel for AVX512-BF16 refuses the three labels, and packs for good
    return loaded.eval()


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weight is quantized, by the name they have without adapters."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt", "HQQLinear")
        or (isinstance(module, nn.Linear) and type(module.weight).__module__.startswith("torchao."))
    }


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that the quantized weights consist of, bias included."""
    found: dict[str, torch.Tensor] = {}
    for name, module in quantized_layers(model).items():
        for key, tensor in _packed_tensors(module).items():
            found[f"{name}.{key}"] = tensor.detach().clone()
        if getattr(module, "bias", None) is not None:
            found[f"{name}.bias"] = module.bias.detach().clone()
    return found


def _packed_tensors(module: Any) -> dict[str, torch.Tensor]:
    kind = type(module).__name__
    if kind == "Linear4bit":
        return {"weight": module.weight.data, "absmax": module.weight.quant_state.absmax}
    if kind == "Linear8bitLt":
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return {"weight": module.weight.data, "scales": scales}
    if kind == "HQQLinear":
        return {"weight": module.W_q.data, "scale": module.meta["scale"], "zero": module.meta["zero"]}
    names, _ = module.weight.__tensor_flatten__()
    return {name: getattr(module.weight, name) for name in names}
