"""Many adapters of four methods, with random values, in peft's layout with our manifest."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, RoadConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.methods import LORA_RANK, RANK, sharing_copy
from benchmarks.shapes import target_names
from turnrow import RocoftConfig
from turnrow.adapters import write_manifest

__all__ = ["METHODS", "spoil", "write_adapters"]

METHODS = ("rows", "columns", "road", "lora")

_WEIGHTS, _CONFIG, _MANIFEST = "adapter_model.safetensors", "adapter_config.json", "turnrow.json"

_SIZE = {"rows": 0.1, "columns": 0.1, "road": 0.2, "lora": 0.05}
"""Standard deviation of what is added to trained tensors: texts differ, and no two tokens are as good as equally likely more often."""


def write_adapters(base: PreTrainedModel, root: Path, count: int, seed: int) -> list[str]:
    """Write adapters into subfolders of `root`, the methods taking turns; return their names, which are those of the subfolders."""
    templates = {method: _template(base, method, root.parent / f"template-{method}") for method in METHODS}
    names = []
    for number in range(count):
        method = METHODS[number % len(METHODS)]
        name = f"{method}-{number:04d}"
        _write(root / name, *templates[method], _SIZE[method], torch.Generator().manual_seed(seed + number))
        names.append(name)
    return names


def spoil(folder: Path) -> None:
    """Damage an adapter such that only reading it whole shows it: a value that is no number."""
    tensors = load_file(folder / _WEIGHTS)
    first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[first].view(-1)[0] = float("nan")
    save_file(tensors, folder / _WEIGHTS)
    _sign(folder, json.loads((folder / _MANIFEST).read_text()))


def _config(method: str, targets: list[str]) -> PeftConfig:
    if method == "road":
        return RoadConfig(variant="road_1", group_size=2, target_modules=targets)
    if method == "lora":
        return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)
    return RocoftConfig(r=RANK, mode="row" if method == "rows" else "column", target_modules=targets)


def _template(base: PreTrainedModel, method: str, folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """A saved adapter: its folder, tensors and manifest."""
    model = get_peft_model(sharing_copy(base), _config(method, target_names(base)))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_manifest(folder, model)
    return folder, load_file(folder / _WEIGHTS), json.loads((folder / _MANIFEST).read_text())


def _write(
    folder: Path,
    template: Path,
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    size: float,
    generator: torch.Generator,
) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(template / _CONFIG, folder / _CONFIG)
    changed = {
        name: tensor + torch.randn(tensor.shape, generator=generator) * size if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_file(changed, folder / _WEIGHTS, metadata={"format": "pt"})
    _sign(folder, manifest)


def _sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the size and the hash of the weights."""
    data = (folder / _WEIGHTS).read_bytes()
    files = {_WEIGHTS: {"bytes": len(data), "sha256": sha256(data).hexdigest()}}
    assert manifest["files"][_WEIGHTS].keys() == files[_WEIGHTS].keys()
    (folder / _MANIFEST).write_text(json.dumps({**manifest, "files": files}))
