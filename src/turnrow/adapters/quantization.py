"""How a base model is quantized, as transformers says it: from a model into plain values, and back into its configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from turnrow.errors import UserError, near_matches

__all__ = ["describe_quantization", "needed_package", "quantization_config"]

_PACKAGES = {
    "bitsandbytes": "turnrow[quantized]",
    "torchao": "turnrow[quantized]",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
}
"""What to install for a method; for the others, transformers says it itself."""


def describe_quantization(model: nn.Module) -> dict[str, Any] | None:
    """Return the quantization of `model` as JSON values, which `quantization_config` reads back; None if it has none."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    # an enum member becomes its value; what begins with _ are transformers' own notes, which it does not take back
    return {key: getattr(value, "value", value) for key, value in values.items() if not key.startswith("_")}


def quantization_config(settings: Mapping[str, Any]) -> QuantizationConfigMixin:
    """Make transformers' configuration of a quantization from its plain values, as they stand in a model's ``config.json``.

    Raises:
        UserError: no method of transformers by that name, its package is not installed, or it refuses a value.
    """
    method = _method(settings)
    needed_package(method)
    known = {**settings, "quant_method": method}
    try:
        return AutoQuantizationConfig.from_dict(known)
    except (TypeError, ValueError, AssertionError, ImportError, KeyError) as error:
        raise UserError(f"quantization {dict(settings)!r}: {type(error).__name__}: {error}") from error


def needed_package(method: str) -> None:
    """Raise UserError, naming what to install, where the package of a method is not there."""
    if method in _PACKAGES and importlib.util.find_spec(method) is None:
        raise UserError(
            f"quantization by {method!r} needs the package {method}, which is not installed: pip install '{_PACKAGES[method]}'"
        )


def _method(settings: Mapping[str, Any]) -> str:
    # transformers has two entries for bitsandbytes, and tells them apart by load_in_4bit and load_in_8bit
    allowed = sorted({name.partition("_4bit")[0].partition("_8bit")[0] for name in AUTO_QUANTIZATION_CONFIG_MAPPING})
    bits = bool(settings.get("load_in_4bit")) + bool(settings.get("load_in_8bit"))
    method = settings.get("quant_method", "bitsandbytes" if bits else None)
    if method not in allowed:
        raise UserError(
            f"quantization has quant_method {method!r}"
            f"{near_matches(str(method), allowed) or '; allowed are ' + ', '.join(allowed)}"
        )
    if method == "bitsandbytes" and bits != 1:
        raise UserError("quantization by bitsandbytes needs one of load_in_4bit: true and load_in_8bit: true")
    return method
