"""Encode a split row by row, or batch by batch, in memory."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = ["encode_rows"]


def encode_rows(
    data: Dataset,
    encode: Callable[[Any, Any], dict[str, Any]],
    split: str,
    *,
    batched: bool = False,
    keep: Collection[str] = (),
    features: Features | None = None,
) -> Dataset:
    """Return what `encode` makes of each row, without the row's own columns.

    Args:
        data: the split.
        encode: given a row and its number from 0; or, `batched`, lists of both, when it may return more or fewer rows.
        split: named on the bar.
        batched: whether `encode` takes many rows at once.
        keep: own columns that stay.
        features: the types of the result, where they are not to be guessed.
    """
    held = data.with_format(None)
    return held.map(
        encode,
        batched=batched,
        with_indices=True,
        remove_columns=[name for name in held.column_names if name not in keep],
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        # Given, or `datasets` would pickle the tokenizer to hash it for a cache that is not used.
        new_fingerprint=uuid.uuid4().hex,
        desc=f"Encoding {split}",
    )
