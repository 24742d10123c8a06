"""Write a RoCoFT adapter in the LoRA format, which every LoRA server reads, without loss.

A change of r rows or columns is a LoRA of rank r whose other factor is one-hot (Delta = B A, `turnrow.ops`):
rows A = delta (r, in), B (out, r) one-hot; columns A (r, in) one-hot, B = delta (out, r); both together one above the
other, of rank 2 r. With alpha = r the scaling is 1 for every module, and each entry of B A is one product with 1 plus zeros,
so it equals delta exactly.

The file keeps to what vLLM's loader accepts as well as peft's, see `turnrow.adapters.lora_rules`; what it cannot keep to there
(a rank above 512, experts) `broken_rules` says of the result.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.checks import check_against_model, check_finite
from turnrow.adapters.expert_lora import expert_loras
from turnrow.adapters.fingerprint import weight_shape
from turnrow.adapters.folder import KEY_PREFIX, WEIGHTS_NAME
from turnrow.adapters.lora_rules import SAVED, check_saved_modules
from turnrow.adapters.low_rank import low_rank_factors
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import new_folder
from turnrow.errors import UserError
from turnrow.ops import columns, rows

__all__ = ["export_lora", "lora_config"]


def export_lora(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, base: torch.nn.Module | None = None
) -> Path:
    """Write the RoCoFT adapter in `path` as a LoRA adapter into the folder `out`.

    Args:
        path: the adapter's folder.
        out: a new or empty folder.
        base: the base model, which may be on the meta device; needed when the adapter has no ``turnrow.json``, because a
            change of rows alone does not say how many rows the weight has, and when it trains fused experts, see
            `turnrow.adapters.expert_lora`.

    Returns:
        The folder `out`.

    Raises:
        UserError: the adapter is no RoCoFT adapter, has trained biases or other modules trained whole, holds non-finite
            values, or the sizes of its weights are not known; `out` is not empty.
    """
    adapter = read_adapter(path)
    _check_exportable(adapter)
    check_finite(adapter)
    if base is not None:
        check_against_model(adapter, base)
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in adapter.saved_modules.items()}
    experts = expert_loras(adapter, base)
    factors = _factors(adapter, base)
    for module, (a, b) in factors.items():
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = b.contiguous()
    for lora in experts.values():
        tensors[f"{KEY_PREFIX}{lora.place}.lora_A.weight"] = lora.a
        tensors[f"{KEY_PREFIX}{lora.place}.lora_B.weight"] = lora.b
    ranks = {module: len(a) for module, (a, _) in factors.items()}
    config = lora_config(adapter, ranks, {name: lora.rank for name, lora in experts.items()})
    with new_folder(out) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return Path(out)


def _check_exportable(adapter: AdapterFile) -> None:
    if adapter.method == "LORA":
        raise UserError(f"{adapter.path} is a LoRA adapter already")
    if adapter.method == "ROAD":
        raise UserError(
            f"{adapter.path} is a RoAd adapter: turning the outputs changes W by (R - I) W, which has full rank, so no LoRA "
            "holds it exactly. Merge it into the base instead (`turnrow merge`), or export the nearest of a rank (`--rank`, "
            "export_road_lora)"
        )
    if adapter.method != "ROCOFT":
        raise UserError(f"{adapter.path} is a {adapter.method} adapter: only ROCOFT adapters have an exact LoRA form")
    if adapter.config.get("mode") == "entry":
        raise UserError(
            f"{adapter.path} changes single entries of each weight, which in general is of full rank, so no LoRA holds it exactly. "
            "Merge it into the base instead (`turnrow merge`)"
        )
    biased = next((module for module, tensors in adapter.modules.items() if "rocoft_bias" in tensors), None)
    if biased is not None:
        raise UserError(
            f"{adapter.path} has trained biases (the first in {biased!r}), and LoRA servers refuse an adapter with biases: train "
            "with bias='none', or merge it into the base (`turnrow merge`)"
        )
    check_saved_modules(adapter)


def _factors(adapter: AdapterFile, base: torch.nn.Module | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        module: low_rank_factors(tensors, rows, columns, *_shape(adapter, module, base))
        for module, tensors in adapter.modules.items()
        if module not in adapter.fused_weights
    }


def _shape(adapter: AdapterFile, module: str, base: torch.nn.Module | None) -> tuple[int, ...]:
    if module in adapter.base_prints:
        return adapter.base_prints[module].shape
    shape = None if base is None else weight_shape(base.get_submodule(module))
    if shape is None:
        raise UserError(
            f"{adapter.path} has no turnrow.json that says how large the weight of {module!r} is: name the base model "
            "(base=..., or --base on the command line)"
        )
    return shape


def lora_config(adapter: AdapterFile, ranks: dict[str, int], ranks_of_experts: dict[str, int]) -> LoraConfig:
    """The configuration of a LoRA with these ranks by module, and by fused weight; its scaling is 1."""
    r = max([*ranks.values(), *ranks_of_experts.values()])
    lower = {name: rank for name, rank in (ranks | ranks_of_experts).items() if rank != r}
    saved = sorted({part for name in adapter.saved_modules for part in name.split(".") if part in SAVED})
    prints = [adapter.base_prints[module] for module in ranks if module in adapter.base_prints]
    config = LoraConfig(
        task_type=adapter.config.get("task_type"),
        auto_mapping=adapter.config.get("auto_mapping"),
        base_model_name_or_path=adapter.config.get("base_model_name_or_path"),
        revision=adapter.config.get("revision"),
        inference_mode=True,
        r=r,
        lora_alpha=r,
        rank_pattern=lower,
        alpha_pattern=dict(lower),
        modules_to_save=saved or None,
        target_parameters=list(ranks_of_experts) or None,
        fan_in_fan_out=bool(prints) and all(print_.transposed for print_ in prints),
    )
    config.target_modules = sorted(ranks)  # peft makes a set of it, whose order in the file would be another every time
    return config
