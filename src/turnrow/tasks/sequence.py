"""Tasks with one label for a text or a pair of texts: what classification and regression share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.columns import check_name, describe_split, is_name, require_columns, text_column
from turnrow.tasks.encoding import encode_rows
from turnrow.tasks.task import Task
from turnrow.tasks.tokens import ready_to_pad, resolve_max_length, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["SequenceTask"]


@dataclass(kw_only=True)
class SequenceTask(Task):
    """A task with one label for a text or a pair of texts, read off one output vector of the model."""

    auto_model = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    mean_loss: ClassVar[bool] = True

    text: str | list[str]
    """The column of the text, or the two columns of a pair."""
    label: str = "label"
    """The column of the label."""
    text_columns: list[str] = field(init=False)
    """`text` as a list of one or two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text_columns = _one_or_two_names(self.text)
        check_name(self.label, "label")
        if len({*self.text_columns, self.label}) <= len(self.text_columns):
            raise UserError(
                f"options 'text' and 'label' must name different columns, got {self.text!r} and {self.label!r}"
            )

    def columns(self) -> list[str]:
        """Return the columns of the texts and of the label."""
        return [*self.text_columns, self.label]

    def input_columns(self) -> list[str]:
        """One text, or the two of a pair."""
        return list(self.text_columns)

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode texts or pairs, cut to `max_length` (of a pair the longer text first); see `Task.encode`."""
        labelled = split != "predict"
        require_columns(data, self.columns() if labelled else self.text_columns, split)
        for column in self.text_columns:
            text_column(data, column, split)
        labels = self._encode_labels(data, split) if labelled else None
        limit = resolve_max_length(tokenizer, max_length, pair=len(self.text_columns) == 2)

        def encode_batch(batch: dict[str, list[str]], rows: list[int]) -> dict[str, list[Any]]:
            texts, *pairs = (batch[column] for column in self.text_columns)
            encoded = tokenize(tokenizer, texts, pairs[0] if pairs else None, limit)
            for row, ids in zip(rows, encoded["input_ids"], strict=True):
                if not ids:
                    raise UserError(
                        f"{describe_split(data, split)}, row {row + 1}: the text is empty, and this tokenizer adds no "
                        "token of its own to it, so the model would have nothing to read; remove the row"
                    )
            return encoded if labels is None else {**encoded, "labels": [labels[row] for row in rows]}

        return encode_rows(data.select_columns(self.text_columns), encode_batch, split, batched=True)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that pads a batch to its longest row."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(ready_to_pad(tokenizer))

    @abstractmethod
    def _encode_labels(self, data: Dataset, split: str) -> list[int] | list[float]:
        """Return the label of each row as the model is trained on it."""


def finite_logits(predictions: np.ndarray, width: int) -> np.ndarray:
    """Return predictions as float64 of shape (rows, width), or refuse them."""
    logits = np.asarray(predictions, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] != width:
        raise UserError(
            f"predictions must have the shape (rows, {width}), got {logits.shape}: the head of the model does not fit "
            "the labels of the task; load the adapter together with the task that it was trained on"
        )
    rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if rows.size:
        raise UserError(
            f"the prediction for row {rows[0] + 1} is {logits[rows[0]].tolist()}, and {rows.size} of {len(logits)} rows "
            "are not finite: the model has diverged; train it with a lower learning rate"
        )
    return logits


def _one_or_two_names(text: object) -> list[str]:
    names = [text] if isinstance(text, str) else text
    if not isinstance(names, list | tuple) or not 1 <= len(names) <= 2 or not all(map(is_name, names)):
        raise UserError(f"option 'text' must be the name of a column or a list of one or two, got {text!r}")
    return list(names)
