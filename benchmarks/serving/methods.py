"""What is compared, and adapters with random values in peft's layout, as training would have left them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, RoadConfig, get_peft_model
from transformers import PreTrainedModel

from benchmarks.methods import LORA_RANK, RANK, sharing_copy
from turnrow import RocoftConfig
from turnrow.adapters import write_manifest

__all__ = ["BASE", "METHODS", "PEFT_BASE", "Method", "enliven", "write_adapters"]

BASE = "base"
PEFT_BASE = "peft_base"

_SIZE = {"ROAD": 0.5, "ROCOFT": 0.3, "LORA": 0.1}
"""Standard deviation of what is added to a parameter's initial value: enough that every adapter has an answer of its own."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    title: str
    where: Literal["engine", "peft"]
    """``engine``: continuous batching of turnrow. ``peft``: one static batch through `generate`, adapters by ``adapter_names``."""
    config: Callable[[list[str]], PeftConfig] | None
    """Of its adapters, given the names of the layers; None for the base model alone."""
    files: str | None = None
    """The method whose files it is served from; None for its own."""


def _lora(targets: list[str]) -> PeftConfig:
    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)


METHODS: dict[str, Method] = {
    BASE: Method("the base model alone", "engine", None),
    "road_1": Method("**RoAd1**", "engine", lambda t: RoadConfig(variant="road_1", group_size=2, target_modules=t)),
    "road_1_halves": Method(
        "RoAd1, group_size=64 (peft's default)",
        "engine",
        lambda t: RoadConfig(variant="road_1", group_size=64, target_modules=t),
    ),
    "rows": Method(f"**RoCoFT rows r={RANK}**", "engine", lambda t: RocoftConfig(r=RANK, target_modules=t)),
    "columns": Method(
        f"**RoCoFT columns r={RANK}**", "engine", lambda t: RocoftConfig(r=RANK, mode="column", target_modules=t)
    ),
    "lora": Method(f"LoRA r={LORA_RANK}, by grouped products", "engine", _lora),
    PEFT_BASE: Method("generate: the base model alone", "peft", None),
    "peft_lora": Method(f"peft: LoRA r={LORA_RANK}", "peft", _lora, files="lora"),
    "peft_road": Method(
        "peft: RoAd1",
        "peft",
        lambda t: RoadConfig(variant="road_1", group_size=64, target_modules=t),
        files="road_1_halves",
    ),
}


@torch.no_grad()
def enliven(model: PreTrainedModel, targets: list[str]) -> None:
    """Give the random weights of these layers the variance 1 / inputs; as they begin, narrow layers pass hardly anything on."""
    for name in targets:
        weight: torch.Tensor = model.get_parameter(f"{name}.weight")
        weight.mul_((weight.shape[1] * weight.float().var()) ** -0.5)


def write_adapters(method: Method, base: PreTrainedModel, targets: list[str], root: Path, count: int, seed: int) -> int:
    """Write `count` adapters into the subfolders ``0``, ``1``, ... of `root`; return the parameters of one.

    The file of adapter n depends on the method, the seed and n alone.
    """
    assert method.config is not None
    config = method.config(targets)
    size = _SIZE[str(getattr(config.peft_type, "value", config.peft_type))]
    model = get_peft_model(sharing_copy(base), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initial = [parameter.detach().clone() for parameter in trained]
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        with torch.no_grad():
            for parameter, value in zip(trained, initial, strict=True):
                noise = torch.randn(value.shape, generator=generator) * size
                parameter.copy_(value + noise.to(value))
        model.save_pretrained(str(root / str(number)), save_embedding_layers=False)
        write_manifest(root / str(number), model)
    return sum(parameter.numel() for parameter in trained)
