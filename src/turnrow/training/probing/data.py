"""The rows of a probe: a few of each class to train on, others to look at, batched by length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from turnrow.analysis.ntk import Batch
from turnrow.errors import UserError
from turnrow.tasks import Task, draw_few_shot
from turnrow.tasks.label_words import label_classes
from turnrow.training.base import Base
from turnrow.training.batches import collated, model_columns
from turnrow.training.quiet import without_dataset_bars

__all__ = ["Sample", "Source", "draw"]

_NUMBER = "turnrow_row"


@dataclass(frozen=True)
class Source:
    """Where the rows of every draw come from."""

    train: Dataset
    held: Dataset | None
    """None: rows of the training split that were not drawn."""
    task: Task
    base: Base
    limit: int | None
    """Tokens a row."""

    @property
    def held_from(self) -> str:
        """In words."""
        return "other rows of the training split" if self.held is None else "the validation split"


@dataclass(frozen=True)
class Sample:
    """Encoded rows in batches of similar length."""

    encoded: Dataset
    """In the order of the batches."""
    labelled: list[Batch]
    """What the model is trained with."""
    labels: np.ndarray
    """As `Task.metrics` wants them."""
    classes: np.ndarray
    """The number of each row's class, (n,)."""

    @property
    def batches(self) -> list[Batch]:
        """Without the labels."""
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in self.labelled]


def draw(source: Source, shots: int, rows: int, seed: int, batch: int) -> tuple[Sample, Sample]:
    """Draw `shots` rows of each class, and at most `rows` others that are equal to none of them.

    Raises:
        UserError: a class has too few rows, or no other rows are left.
    """
    whole, task = source.train, source.task
    numbered = whole.add_column(_NUMBER, list(range(len(whole))))
    with without_dataset_bars():
        few, _ = draw_few_shot(numbered, task, shots, seed, option="shots")
        drawn = set(few[_NUMBER])
        rest = source.held
        if rest is None:
            rest = whole.select([number for number in range(len(whole)) if number not in drawn])
        rest = _without(rest, few, task.input_columns())
        if not len(rest):
            raise UserError(
                f"no rows are left to score on beside {shots} of each class; lower shots, or name a validation split"
            )
        rest = rest.shuffle(seed=seed).select(range(min(rows, len(rest))))
        return _encoded(source, few.remove_columns(_NUMBER), "train", batch), _encoded(source, rest, "held", batch)


def _by_length(encoded: Dataset) -> list[int]:
    """The rows from the shortest on."""
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def _without(rest: Dataset, few: Dataset, columns: list[str]) -> Dataset:
    seen = {repr(row) for row in few.select_columns(columns)}
    kept = [number for number, row in enumerate(rest.select_columns(columns)) if repr(row) not in seen]
    return rest.select(kept)


def _encoded(source: Source, table: Dataset, split: str, size: int) -> Sample:
    task = source.task
    encoded = task.encode(table, source.base.tokenizer, source.limit, split=split)
    encoded = encoded.select(_by_length(encoded))
    batches: list[Batch] = list(
        collated(model_columns(encoded, source.base.model, task), task.collator(source.base.tokenizer), size)
    )
    labels = [row for batch in batches for row in batch["labels"]]
    if labels[0].ndim == 0:
        numbers = torch.stack(labels).numpy()
        return Sample(encoded, batches, numbers, numbers)
    words = task.word_ids  # type: ignore[attr-defined]
    classes = torch.cat([label_classes(batch["labels"], words) for batch in batches]).numpy()
    return Sample(encoded, batches, np.asarray(words)[classes][:, None], classes)
