"""Batches of rows of unequal length for language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turnrow.tasks.tokens import ready_to_pad

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "LanguageCollator", "pad_rows"]

IGNORED = -100
"""The label of a token that is not learned; torch's own number for it."""


@dataclass
class LanguageCollator:
    """Pads rows of `input_ids`, `attention_mask` and, where they have them, `labels` to the longest of a batch.

    Rows with labels are padded at the end. Rows without are read to be gone on with: where the model itself goes on
    with them, a decoder, they are padded at the beginning, so that the last token of each is its own.
    """

    tokenizer: PreTrainedTokenizerBase
    decoder: bool = True
    """Whether the model goes on with its input; an encoder-decoder answers it."""
    multiple: int = 1
    """Lengths are rounded up to a multiple of this."""

    def __post_init__(self) -> None:
        ready_to_pad(self.tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return tensors of shape (rows, longest), int64."""
        at_end = "labels" in rows[0] or not self.decoder
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return pad_rows(rows, fill, at_end=at_end, multiple=self.multiple)


def pad_rows(
    rows: Sequence[Mapping[str, Any]], fill: Mapping[str, int], *, at_end: bool = True, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Make a batch of the columns named in `fill`, as far as the rows have them.

    Args:
        rows: each with lists of integers.
        fill: what each column is filled up with.
        at_end: whether to fill up at the end, else at the beginning.
        multiple: lengths are rounded up to a multiple of this.

    Returns:
        Tensors of shape (rows, longest), int64.
    """
    import torch

    batch = {}
    for name, value in fill.items():
        if name not in rows[0]:
            continue
        columns = [list(row[name]) for row in rows]
        longest = -(-max(map(len, columns)) // multiple) * multiple
        gaps = [[value] * (longest - len(column)) for column in columns]
        padded = [c + g if at_end else g + c for c, g in zip(columns, gaps, strict=True)]
        batch[name] = torch.tensor(padded, dtype=torch.long)
    return batch
