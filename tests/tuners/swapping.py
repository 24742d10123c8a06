"""Adapters of one shape and the models they go onto, for swapping one for another."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from tests.tuners.models import build
from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import load_adapter, write_manifest

LINEAR = ["q_proj", "v_proj", "down_proj"]


CONFIGS = {
    "row": lambda seed: RocoftConfig(r=2, target_modules=LINEAR, selection="random", selection_seed=seed),
    "column": lambda seed: RocoftConfig(
        mode="column", r=2, target_modules=LINEAR, selection="random", selection_seed=seed
    ),
    "row+column": lambda seed: RocoftConfig(
        mode="row+column", r=2, target_modules=LINEAR, selection="random", selection_seed=seed
    ),
    "entry": lambda seed: RocoftConfig(
        mode="entry", density=0.1, target_modules=LINEAR, selection="random", selection_seed=seed
    ),
    "road_1": lambda seed: RoadConfig(variant="road_1", group_size=4, target_modules=LINEAR),
    "road_2": lambda seed: RoadConfig(variant="road_2", group_size=4, target_modules=LINEAR),
    "road_4": lambda seed: RoadConfig(variant="road_4", group_size=4, target_modules=LINEAR),
    "road_2-blocks": lambda seed: RoadConfig(
        variant="road_2", group_size=4, target_modules=LINEAR, blocks=f"{seed % 2}::2"
    ),
}


class Network(nn.Module):
    """With layers of the names that the adapters are for."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.v_proj(nn.functional.gelu(self.q_proj(x)))))


def save(folder: Path, config: PeftConfig, seed: int, architecture: str | None = "llama") -> Path:
    """An adapter with random values, in a folder with its manifest."""
    torch.manual_seed(0)
    model = get_peft_model(Network() if architecture is None else build(architecture)[0], copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_manifest(folder, model)
    return folder


def save_pair(folder: Path, method: str, architecture: str | None = "llama") -> tuple[Path, Path]:
    """Folders of two adapters of one shape, which change other rows, columns or entries by other values."""
    first, second = (save(folder / f"{method}-{seed}", CONFIGS[method](seed), seed, architecture) for seed in (1, 2))
    return first, second


def load(folder: Path, architecture: str = "llama") -> PeftModel:
    return load_adapter(build(architecture)[0], folder).eval()


def network(folder: Path, **options) -> PeftModel:
    """As `load`, of a network that compiles at once."""
    torch.manual_seed(0)
    return load_adapter(Network(), folder, **options).eval()


def inputs_for(architecture: str = "llama") -> dict[str, torch.Tensor]:
    inputs = build(architecture)[1]
    inputs.pop("labels")
    return inputs
