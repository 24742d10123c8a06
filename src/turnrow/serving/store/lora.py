"""Which LoRA files of peft are served: plain LoRA, of any rank, scale and choice of modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from turnrow.adapters import AdapterFile
from turnrow.adapters.folder import CONFIG_NAME, KEY_PREFIX, WEIGHTS_NAME
from turnrow.errors import AdapterError
from turnrow.serving.layers import ServedLayer

__all__ = ["check_lora", "lora_scale"]

_UNSERVED = (
    "use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Settings of peft that make something else than y += (alpha / r) B A x."""

_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to start that leave the base as it is; the others need a changed base, which the file does not hold."""


def check_lora(adapter: AdapterFile, layers: Mapping[str, ServedLayer]) -> None:
    """Check that a LoRA adapter is a plain one and that its tensors fit the layers (which are known to be there).

    Raises:
        AdapterError: names the setting or the tensor.
    """
    where, config = adapter.path / CONFIG_NAME, adapter.config
    for name in _UNSERVED:
        if config.get(name):
            raise AdapterError(
                f"{where}: {name} is set, and only plain LoRA is served: merge the adapter into a base of its own"
            )
    if config.get("bias", "none") not in ("none", None):
        raise AdapterError(
            f"{where}: bias is {config['bias']!r}, and biases trained beside LoRA are not served (bias='none')"
        )
    if config.get("init_lora_weights", True) not in _STARTS:
        raise AdapterError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base; save the adapter with "
            "peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    path = adapter.path / WEIGHTS_NAME
    if not adapter.modules:
        raise AdapterError(f"{path} holds no LoRA tensors (their names begin with {KEY_PREFIX!r}<module>.lora_A)")
    for name, tensors in adapter.modules.items():
        if set(tensors) != {"lora_A.weight", "lora_B.weight"}:
            raise AdapterError(
                f"{path}: {name!r} has {', '.join(sorted(tensors))}; lora_A.weight and lora_B.weight are served"
            )
        a, b, layer = tensors["lora_A.weight"], tensors["lora_B.weight"], layers[name]
        shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        if a.ndim != 2 or b.ndim != 2 or not a.is_floating_point() or not b.is_floating_point():
            raise AdapterError(f"{path}: {name!r} has {shapes}; two matrices of floating-point numbers are needed")
        if len(a) != b.shape[1] or a.shape[1] != layer.in_features or len(b) != layer.out_features:
            raise AdapterError(
                f"{path}: {name!r} has {shapes}, which do not fit its weight of {layer.out_features} x {layer.in_features} (out x in)"
            )
        lora_scale(adapter, name, len(a))


def lora_scale(adapter: AdapterFile, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with `use_rslora`.

    Raises:
        AdapterError: `lora_alpha` or `alpha_pattern` is unusable.
    """
    alpha = _of_module(adapter, "alpha_pattern", module, adapter.config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise AdapterError(
            f"{adapter.path / CONFIG_NAME}: the lora_alpha of {module!r} is {alpha!r}; it must be a number"
        )
    return float(alpha) / (rank**0.5 if adapter.config.get("use_rslora") else rank)


def _of_module(adapter: AdapterFile, setting: str, module: str, rest: Any) -> Any:
    """The value for a module in one of peft's patterns, whose keys are names, or the ends of names.

    peft takes the keys as regular expressions. One out of a file may run for ever, so that only names are taken here.
    """
    pattern = adapter.config.get(setting) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{adapter.path / CONFIG_NAME}: {setting} is {pattern!r}; it must be an object")
    for key, value in pattern.items():
        plain = key.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise AdapterError(
                f"{adapter.path / CONFIG_NAME}: {setting} has {key!r}, a regular expression; write out the names of the modules"
            )
        if module == plain or (not key.startswith("^") and module.endswith(f".{plain}")):
            return value
    return rest
