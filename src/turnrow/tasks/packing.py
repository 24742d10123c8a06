"""Several examples in one row, so that no token is padding, and none sees another example."""

from __future__ import annotations

import uuid
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError
from turnrow.tasks.padding import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["PackedCollator", "best_fit", "pack_rows"]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things of given lengths into bins: the longest first, each into the bin that it fills best (best-fit decreasing).

    Args:
        lengths: none of them over `capacity`.
        capacity: of each bin.

    Returns:
        For each bin the numbers of the things in it, in their order.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (left, bin), the fullest first
    for thing in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect_left(room, (lengths[thing], -1))
        if place == len(room):
            left, number = capacity, len(bins)
            bins.append([])
        else:
            left, number = room.pop(place)
        bins[number].append(thing)
        insort(room, (left - lengths[thing], number))
    return [sorted(things) for things in bins]


def pack_rows(encoded: Dataset, limit: int) -> Dataset:
    """Put rows of `input_ids` and `labels` together into rows of at most `limit` tokens, with `position_ids` that begin anew with each."""
    from datasets import Dataset as Table

    ids, labels = list(encoded["input_ids"]), list(encoded["labels"])
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    for things in best_fit([len(row) for row in ids], limit):
        rows["input_ids"].append([token for thing in things for token in ids[thing]])
        # The first token of an example would be foreseen from the last of another.
        rows["labels"].append([label for thing in things for label in [IGNORED, *labels[thing][1:]]])
        rows["position_ids"].append([place for thing in things for place in range(len(ids[thing]))])
    packed = Table.from_dict(rows)
    packed.info.dataset_name = encoded.info.dataset_name
    packed._fingerprint = uuid.uuid4().hex
    return packed


@dataclass
class PackedCollator:
    """Makes one row of the rows of a batch, without padding.

    Without an attention mask and a cache, transformers takes the places where `position_ids` begin anew for the borders of
    examples, and lets no token see over them (`transformers.masking_utils`, and its calls of FlashAttention, which do so in a
    batch of one row alone). A model that takes no `position_ids` is refused; one that takes them but makes its attention mask in
    code of its own may ignore the borders.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of shape (1, all tokens), int64."""
        import torch

        if "position_ids" not in rows[0]:
            raise UserError(
                "option 'packing' is true, but this model takes no position_ids, so packed examples would see each other; "
                "leave 'packing' out"
            )
        batch = {
            name: torch.tensor([[value for row in rows for value in row[name]]], dtype=torch.long)
            for name in ("input_ids", "labels", "position_ids")
        }
        return {**batch, "use_cache": False}
