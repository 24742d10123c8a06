"""Write an adapter that was not trained but made: of other adapters, or of two models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from turnrow.adapters.fingerprint import WeightPrint
from turnrow.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, split_by_module
from turnrow.adapters.manifest import store_manifest
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import copy_beside, new_folder

__all__ = ["write_derived_adapter"]

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Of these peft takes the head to be trained whole, and does not load an adapter that lacks it."""


_OF_ITS_OWN = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".md")
"""Endings of what belongs to the one adapter or model alone: weights, and its description."""
_OF_A_MODEL = frozenset({"config.json", "generation_config.json"})


def write_derived_adapter(
    out: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    base: Mapping[str, Any],
    prints: Mapping[str, WeightPrint],
    provenance: Mapping[str, Any],
    beside: Path | None = None,
) -> None:
    """Write the three files of an adapter into the new folder `out`, and read them again before it takes its name.

    Args:
        config: ``adapter_config.json``. Without a head among `tensors` it names the class of the base instead of a task that has one.
        tensors: by their full keys.
        base, prints, provenance: as `store_manifest` takes them.
        beside: a folder whose other small files come along, such as the task and the tokenizer.

    Raises:
        UserError: `out` is not empty; what was made is no valid adapter.
    """
    config = _without_missing_head(config, tensors, base)
    with new_folder(out) as folder:
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        store_manifest(folder, base, prints, provenance)
        if beside is not None:
            copy_beside(beside, folder, but=_OF_ITS_OWN, names=_OF_A_MODEL)
        read_adapter(folder)


def _without_missing_head(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Mapping[str, Any]
) -> Mapping[str, Any]:
    has_head = bool(split_by_module(config["peft_type"], tensors).saved)
    if has_head or config.get("task_type") not in _TASKS_WITH_HEAD:
        return config
    named = {"base_model_class": base["class"], "parent_library": "transformers"} if base.get("class") else None
    return {**config, "task_type": None, "auto_mapping": config.get("auto_mapping") or named}
