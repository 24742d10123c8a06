"""Encoded rows as a model takes them, outside of Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn

from turnrow.tasks import Task

__all__ = ["collated", "model_columns"]


def model_columns(encoded: Dataset, model: nn.Module, task: Task) -> Dataset:
    """The columns of `encoded` that the base model takes, and the labels, as Trainer would leave them."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    columns = inspect.signature(base.forward).parameters
    return encoded.select_columns(
        [name for name in encoded.column_names if name in columns or name in task.label_names]
    )


def collated(rows: Dataset, collate: Callable[[list[dict[str, Any]]], Any], size: int) -> Iterator[dict[str, Any]]:
    """Batches of `size` rows in their order, the last one of what is left."""
    for start in range(0, len(rows), size):
        yield dict(collate([rows[row] for row in range(start, min(start + size, len(rows)))]))
