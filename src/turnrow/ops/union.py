"""The sum of several changes of one weight, and whatever else combines them entry by entry.

A change of W (out, in) is zero but for some rows, some columns or some single entries. Changes of different adapters are
first spread over what any of them changes (`align`): then they are tensors of one shape, zero where an adapter changes
nothing, and combining them is arithmetic on tensors. Sums of changes are changes of the same form, so nothing is approximated:

    rows + rows = rows, columns + columns = columns, rows + columns = rows and columns (what lies in both is the rows'),
    anything + entries = entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnrow.ops import columns

__all__ = ["Aligned", "Change", "Overlap", "align", "overlap"]


Part = tuple[Tensor, Tensor]
"""(delta, index int64)"""


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter changes of one weight (out, in): rows, columns, both, or single entries. None is none."""

    row: Part | None = None
    """(delta (r, in), index (r,) int64)"""
    column: Part | None = None
    """(delta (out, c), index (c,) int64); beside rows (out - r, c), without the changed rows, as `columns.spread` takes it"""
    entry: Part | None = None
    """(delta (n,), index (n,) int64, row * in + column)"""
    in_features: int | None = None
    """Of the weight; needed only where entries meet rows or columns."""

    def whole_columns(self) -> Part | None:
        """The columns with zeros in the rows that are changed as rows: (out, c), and their index."""
        if self.column is None or self.row is None:
            return self.column
        delta, index = self.column
        out_features = len(delta) + len(self.row[1])
        return columns.spread(delta, self._beside_rows(), out_features), index

    def _beside_rows(self) -> Tensor:
        """Which rows of the weight the columns' delta is for."""
        if self.column is None or self.row is None:
            return torch.arange(0 if self.column is None else len(self.column[0]))
        return columns.others(self.row[1], len(self.column[0]) + len(self.row[1]))

    def as_entries(self, in_features: int) -> Part:
        """The same change entry by entry, ascending."""
        if self.entry is not None:
            return self.entry
        values, places = [], []
        if self.row is not None:
            delta, index = self.row
            values.append(delta.flatten())
            places.append((index.unsqueeze(1) * in_features + torch.arange(in_features)).flatten())
        if self.column is not None:
            delta, index = self.column
            values.append(delta.flatten())
            places.append((self._beside_rows().unsqueeze(1) * in_features + index).flatten())
        place, order = torch.cat(places).sort()
        return torch.cat(values)[order], place


@dataclass(frozen=True, eq=False)
class Aligned:
    """Several changes spread over what any of them changes, all in one dtype."""

    row_index: Tensor | None
    column_index: Tensor | None
    entry_index: Tensor | None
    row: list[Tensor]
    """(R, in) of each change; empty where no rows are changed."""
    column: list[Tensor]
    """(out - R, C) of each change, without the rows in `row_index`."""
    entry: list[Tensor]
    """(N,) of each change."""


@dataclass(frozen=True)
class Overlap:
    """What more than one of several changes touches."""

    row: list[int]
    column: list[int]
    crossings: int
    """Entries in a row of one change and a column of another, beside those of the rows and columns above."""
    entries: int
    """Single entries, where any of the changes is of entries."""

    def __str__(self) -> str:
        named = [
            f"{what} {_listed(numbers)}" for what, numbers in (("row", self.row), ("column", self.column)) if numbers
        ]
        counted = ((self.crossings, "entries where rows and columns cross"), (self.entries, "entries"))
        return "; ".join((*named, *(f"{count:,} {what}" for count, what in counted if count)))

    def __bool__(self) -> bool:
        return bool(self.row or self.column or self.crossings or self.entries)


def align(changes: Sequence[Change], dtype: torch.dtype) -> Aligned:
    """Spread changes of one weight over what any of them changes.

    Args:
        changes: one or more; those of another adapter that leaves this weight alone are empty ones.
        dtype: of the values that are returned.

    Raises:
        ValueError: entries meet rows or columns, and no change says how many columns the weight has.
    """
    if any(change.entry is not None for change in changes):
        return _align_entries(changes, dtype)
    row_index = _union([change.row[1] for change in changes if change.row is not None])
    column_index = _union([change.column[1] for change in changes if change.column is not None])
    whole = [change.whole_columns() for change in changes]
    rows = [] if row_index is None else _align_rows(changes, whole, row_index, dtype)
    shifted = [] if column_index is None else _align_columns(whole, row_index, column_index, dtype)
    return Aligned(row_index, column_index, None, rows, shifted, [])


def overlap(changes: Sequence[Change]) -> Overlap:
    """What more than one of the changes touches, even where it adds zero."""
    if any(change.entry is not None for change in changes):
        in_features = _in_features(changes)
        places = [change.as_entries(in_features)[1] for change in changes if not _is_empty(change)]
        return Overlap([], [], 0, len(_repeated(places)))
    row = _repeated([change.row[1] for change in changes if change.row is not None])
    column = _repeated([change.column[1] for change in changes if change.column is not None])
    crossings = torch.zeros(0, 2, dtype=torch.int64)
    for mine in changes:
        for other in changes:
            if mine is other or mine.row is None or other.column is None:
                continue
            own_rows = mine.row[1][~torch.isin(mine.row[1], row)]
            if other.row is not None:
                own_rows = own_rows[~torch.isin(own_rows, other.row[1])]
            own_columns = other.column[1][~torch.isin(other.column[1], column)]
            crossings = torch.cat((crossings, torch.cartesian_prod(own_rows, own_columns).view(-1, 2)))
    return Overlap(row.tolist(), column.tolist(), len(crossings.unique(dim=0)), 0)


def _align_rows(
    changes: Sequence[Change], whole: Sequence[Part | None], row_index: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The rows of each change, with what its columns change in rows of the others."""
    in_features = next(change.row[0].shape[1] for change in changes if change.row is not None)
    aligned = []
    for change, spread in zip(changes, whole, strict=True):
        row = torch.zeros(len(row_index), in_features, dtype=dtype)
        if change.row is not None:
            row.index_copy_(0, torch.searchsorted(row_index, change.row[1]), change.row[0].to(dtype))
        if spread is not None:  # zero in the rows that are this change's own
            row.index_add_(1, spread[1], spread[0].to(dtype)[row_index])
        aligned.append(row)
    return aligned


def _align_columns(
    whole: Sequence[Part | None], row_index: Tensor | None, column_index: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The columns of each change without the rows that any of them changes as rows."""
    out_features = next(len(spread[0]) for spread in whole if spread is not None)
    rest = torch.arange(out_features) if row_index is None else columns.others(row_index, out_features)
    aligned = []
    for spread in whole:
        column = torch.zeros(len(rest), len(column_index), dtype=dtype)
        if spread is not None:
            column.index_copy_(1, torch.searchsorted(column_index, spread[1]), spread[0].to(dtype)[rest])
        aligned.append(column)
    return aligned


def _align_entries(changes: Sequence[Change], dtype: torch.dtype) -> Aligned:
    in_features = _in_features(changes)
    spread = [None if _is_empty(change) else change.as_entries(in_features) for change in changes]
    index = torch.cat([one[1] for one in spread if one is not None]).unique()
    entries = []
    for one in spread:
        entry = torch.zeros(len(index), dtype=dtype)
        if one is not None:
            entry.index_copy_(0, torch.searchsorted(index, one[1]), one[0].to(dtype))
        entries.append(entry)
    return Aligned(None, None, index, [], [], entries)


def _in_features(changes: Sequence[Change]) -> int:
    if all(change.row is None and change.column is None for change in changes):
        return 1  # entries alone are never taken apart
    known = (change.in_features for change in changes)
    of_rows = (change.row[0].shape[1] for change in changes if change.row is not None)
    size = next((size for size in (*known, *of_rows) if size is not None), None)
    if size is None:
        raise ValueError("entries are to be combined with columns, and how many columns the weight has is not known")
    return size


def _is_empty(change: Change) -> bool:
    return change.row is None and change.column is None and change.entry is None


def _listed(numbers: list[int]) -> str:
    first = ", ".join(map(str, numbers[:8]))
    return first if len(numbers) <= 8 else f"{first} and {len(numbers) - 8} more"


def _union(indices: list[Tensor]) -> Tensor | None:
    return torch.cat(indices).unique() if indices else None


def _repeated(indices: list[Tensor]) -> Tensor:
    if not indices:
        return torch.zeros(0, dtype=torch.int64)
    values, counts = torch.cat(indices).unique(return_counts=True)
    return values[counts > 1]
