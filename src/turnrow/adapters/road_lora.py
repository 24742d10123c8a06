"""The nearest LoRA of a RoAd adapter, for servers that know nothing else: not exact, and honest about how far off it is.

Turning the outputs changes W by (R - I) W, which has full rank. Of all changes of rank r the first r terms of its singular value decomposition
are nearest in the Frobenius norm (Eckart and Young, 1936); the error is what the others hold. A bias is turned too, which no
LoRA can say.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.checks import check_against_model, check_base, check_finite
from turnrow.adapters.fingerprint import is_plain
from turnrow.adapters.folder import KEY_PREFIX, WEIGHTS_NAME
from turnrow.adapters.lora import lora_config
from turnrow.adapters.lora_rules import check_saved_modules
from turnrow.adapters.numbers import is_count
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import check_new_folder, new_folder
from turnrow.errors import UserError
from turnrow.ops import pairs

__all__ = ["RoadExport", "export_road_lora"]

_EXACT_SIZE = 1024
"""Up to this smaller side of a weight all singular values are computed; of larger ones only as many as are needed, at random."""


@dataclass(frozen=True)
class RoadExport:
    """What was written, and how far off it is."""

    path: Path
    rank: int
    errors: dict[str, tuple[float, float]]
    """By module: Frobenius norms of what the LoRA leaves out of the change of the weight, and of that change."""
    biases: dict[str, float]
    """By module: norm of the change of the bias, which is left out."""

    @property
    def relative_error(self) -> float:
        """What is left out of the weights of all modules together, over their change."""
        change = math.hypot(*(norm for _, norm in self.errors.values()))
        return math.hypot(*(rest for rest, _ in self.errors.values())) / change if change else 0.0


@torch.no_grad()
def export_road_lora(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, base: torch.nn.Module, rank: int, check: bool = True
) -> RoadExport:
    """Write the nearest LoRA of the given rank to the RoAd adapter in `path` into the folder `out`.

    Args:
        path: the adapter's folder.
        out: a new or empty folder.
        base: the base model, with dense weights.
        rank: of the LoRA; at most the smaller side of each weight counts.
        check: compare the base with the fingerprint in ``turnrow.json``.

    Raises:
        UserError: it is no RoAd adapter; `rank` is no whole number from 1; the base is another, or quantized; the adapter holds modules
            whole that LoRA servers do not take; `out` is not empty.
    """
    if not is_count(rank):
        raise UserError(f"rank is {rank!r}; it must be a whole number, 1 or more")
    check_new_folder(out)
    adapter = read_adapter(path)
    if adapter.method != "ROAD":
        raise UserError(
            f"{adapter.path} is a {adapter.method} adapter, a ROAD adapter is needed; export_lora writes ROCOFT exactly"
        )
    check_finite(adapter)
    check_saved_modules(adapter)
    check_against_model(adapter, base)
    if check:
        check_base(adapter, base)
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in adapter.saved_modules.items()}
    errors: dict[str, tuple[float, float]] = {}
    biases: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for name, own in adapter.modules.items():
        module = base.get_submodule(name)
        weight, blocks = _dense(name, module), _blocks(adapter, own)
        change = pairs.rotate_rows(weight, blocks) - weight
        a, b, errors[name] = _nearest(change, rank)
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"], tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = a, b
        ranks[name] = len(a)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            turned = pairs.rotate_values(bias.detach().float(), blocks) - bias.detach().float()
            biases[name] = torch.linalg.vector_norm(turned).item()
    config = lora_config(adapter, ranks, {})
    with new_folder(out) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return RoadExport(Path(out), max(ranks.values()), errors, biases)


def _blocks(adapter: AdapterFile, tensors: dict[str, Tensor]) -> pairs.Blocks:
    parameters = tensors["road_theta"].float(), tensors["road_alpha"].float()
    return pairs.coefficients(adapter.config["variant"], adapter.config["group_size"], *parameters)


def _dense(name: str, module: torch.nn.Module) -> Tensor:
    """(out, in), in float32."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not is_plain(weight):
        raise UserError(f"the weight of {name!r} is quantized, or not loaded: export from a base with dense weights")
    values = weight.detach().float()
    return values.t() if isinstance(module, Conv1D) else values


def _nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """(A (r, in), B (out, r)) nearest to the change, and the norms of what they leave out and of the change."""
    rank = min(rank, *change.shape)
    if min(change.shape) <= _EXACT_SIZE:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=min(rank + 16, *change.shape), niter=4)
        u, s, vh = u[:, :rank], s[:rank], v[:, :rank].t()
    root = s.sqrt()
    a, b = (root.unsqueeze(1) * vh).contiguous(), (u * root).contiguous()
    rest = torch.linalg.vector_norm(change - b @ a).item()
    return a, b, (rest, torch.linalg.vector_norm(change).item())
