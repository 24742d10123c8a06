"""Results on disk under a key of everything that decides them: model, data, outputs, descriptions.

A result is one safetensors file of float64 arrays, named by the hash of its key, which it carries as JSON. It is there whole or not
at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from turnrow.analysis.ntk.factors import Batch, Outputs
from turnrow.errors import UserError
from turnrow.files import write_bytes

__all__ = ["FORMAT", "key_of", "read", "write"]

FORMAT = 1
"""Grows whenever the same request means other numbers."""


def key_of(
    model: nn.Module,
    batches: Sequence[Batch],
    other_batches: Sequence[Batch],
    outputs: Outputs,
    terms: Mapping[str, Sequence[str]],
) -> str:
    """JSON of what a result depends on.

    Raises:
        UserError: `outputs` has no `cache_key`.
    """
    outputs_key = getattr(outputs, "cache_key", None)
    if not isinstance(outputs_key, str):
        raise UserError(
            f"outputs is {outputs!r}, of which a cache cannot tell whether it is the same next time; take one of "
            "turnrow.analysis.ntk, give yours a string `cache_key` that names all it depends on, or leave out cache"
        )
    key = {
        "format": FORMAT,
        "model": _hash_of_model(model),
        "train": [_hash_of_batch(batch) for batch in batches],
        "other": [_hash_of_batch(batch) for batch in other_batches],
        "outputs": outputs_key,
        "kernels": {name: sorted(keys) for name, keys in terms.items()},
    }
    return json.dumps(key, sort_keys=True)


def read(folder: str | os.PathLike[str], key: str) -> dict[str, np.ndarray] | None:
    """What was written under a key; None where nothing was, or where the file is damaged."""
    path = _path(folder, key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError:
        return None


def write(folder: str | os.PathLike[str], key: str, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays under a key, making the folder."""
    path = _path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata={"key": key}))
    return path


def _path(folder: str | os.PathLike[str], key: str) -> Path:
    return Path(folder) / f"kernels-{sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _hash_of_model(model: nn.Module) -> str:
    """Of its modules, its settings and every value in it."""
    state = sha256(repr(model).encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        state.update(config.to_json_string(use_diff=False).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _update(state, name, tensor)
    return state.hexdigest()


def _hash_of_batch(batch: Batch) -> str:
    state = sha256()
    for name in sorted(batch):
        _update(state, name, batch[name])
    return state.hexdigest()


def _update(state: Any, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        state.update(f"{name} {value!r}".encode())
        return
    values = value.detach().cpu().contiguous()
    state.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
    if values.numel():
        state.update(values.flatten().view(torch.uint8).numpy())
