"""What the adapters in the slots do to one layer: a `Patch` for every kind of part, applied to all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turnrow.ops import packed, pairs
from turnrow.ops.packed import Grouping
from turnrow.serving.batch.tables import Table
from turnrow.serving.store.parts import Part

__all__ = ["Patch", "patch_for"]

_STEADY = 256
"""Up to this many tokens, what is gathered for a step is kept for the next, which in decoding is for the same requests."""


class Patch:
    """The parts of one kind in all slots, on one layer."""

    tables: tuple[Table, ...]

    def __init__(self, device: torch.device, out_features: int, in_features: int) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.device = device
        self.slots: frozenset[int] = frozenset()
        """Those that hold a part of this kind for this layer."""
        self._ranks: dict[int, int] = {}
        self._gathered: tuple[Grouping, Any] | None = None

    def put(self, slot: int, part: Part) -> None:
        """Put a part into a slot."""
        for table, tensor in zip(self.tables, part.tensors, strict=True):
            table.put(slot, tensor)
        self._ranks[slot] = len(part.tensors[0])
        self.slots |= {slot}
        self._gathered = None

    def drop(self, slot: int) -> None:
        """Empty a slot, if it holds anything."""
        self._ranks.pop(slot, None)
        self.slots -= {slot}

    def apply_(self, y: Tensor, x: Tensor, grouping: Grouping) -> None:
        """Change the layer's output in place.

        Args:
            y: (tokens of the row, out), contiguous.
            x: (tokens of the row, in), contiguous.
            grouping: of the tokens whose adapters have a part here.
        """
        known = self._gathered
        if known is not None and known[0] is grouping:
            gathered = known[1]
        else:
            gathered = self._gather(grouping)
            steady = grouping.tiles is None and grouping.runs is None and len(grouping.slots) <= _STEADY
            self._gathered = (grouping, gathered) if steady else None
        self._apply_(y, x, gathered, grouping)

    def _gather(self, grouping: Grouping) -> Any:
        """What the tokens of the grouping need of the tables."""
        raise NotImplementedError

    def _apply_(self, y: Tensor, x: Tensor, gathered: Any, grouping: Grouping) -> None:
        raise NotImplementedError

    def _rank(self) -> int:
        return max(self._ranks.values())

    def _matrices(self, table: Table, grouping: Grouping) -> Tensor:
        return packed.stack(_filled(table), self._rank(), grouping)

    def _flat(self, table: Table, grouping: Grouping, width: int) -> Tensor:
        """(n, r) places in (tokens, width) laid flat, of a table of features (S, r)."""
        features = _filled(table)[:, : self._rank()].index_select(0, grouping.slots)
        tokens = grouping.tokens
        if tokens is None:
            tokens = torch.arange(len(grouping.slots), device=features.device)
        return features + (tokens * width).unsqueeze(1)


class _Rows(Patch):
    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.tables = Table(self.device, ranked=True), Table(self.device, ranked=True)

    def _gather(self, grouping: Grouping) -> tuple[Tensor, Tensor]:
        deltas, index = self.tables
        return self._matrices(deltas, grouping), self._flat(index, grouping, self.out_features)

    def _apply_(self, y: Tensor, x: Tensor, gathered: tuple[Tensor, Tensor], grouping: Grouping) -> None:
        packed.add_rows_(y, x, *gathered, grouping)


class _Columns(_Rows):
    def _gather(self, grouping: Grouping) -> tuple[Tensor, Tensor]:
        deltas, index = self.tables
        return self._matrices(deltas, grouping), self._flat(index, grouping, self.in_features)

    def _apply_(self, y: Tensor, x: Tensor, gathered: tuple[Tensor, Tensor], grouping: Grouping) -> None:
        packed.add_columns_(y, x, *gathered, grouping)


class _LowRank(_Rows):
    def _gather(self, grouping: Grouping) -> tuple[Tensor, Tensor]:
        a, b = self.tables
        return self._matrices(a, grouping), self._matrices(b, grouping)

    def _apply_(self, y: Tensor, x: Tensor, gathered: tuple[Tensor, Tensor], grouping: Grouping) -> None:
        packed.add_low_rank_(y, x, *gathered, grouping)


class _Entries(Patch):
    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.tables = tuple(Table(self.device, ranked=True) for _ in range(3))

    def _gather(self, grouping: Grouping) -> tuple[Tensor, Tensor, Tensor]:
        deltas, rows, columns = self.tables
        own = _filled(deltas)[:, : self._rank()].index_select(0, grouping.slots)
        return own, self._flat(rows, grouping, self.out_features), self._flat(columns, grouping, self.in_features)

    def _apply_(self, y: Tensor, x: Tensor, gathered: tuple[Tensor, Tensor, Tensor], grouping: Grouping) -> None:
        packed.add_entries_(y, x, *gathered)


class _Bias(Patch):
    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.tables = (Table(self.device, ranked=False),)

    def _gather(self, grouping: Grouping) -> Tensor:
        return _of_tokens(self.tables[0], grouping)

    def _apply_(self, y: Tensor, x: Tensor, gathered: Tensor, grouping: Grouping) -> None:
        if grouping.tokens is None:
            y.add_(gathered)
        else:
            y.index_add_(0, grouping.tokens, gathered.expand(len(grouping.tokens), -1))


class _Rotation(Patch):
    """z_i = R_{s_i} y_i, in the form that `pairs.prepare` chose."""

    def __init__(self, form: str, *sizes: Any) -> None:
        super().__init__(*sizes)
        self._form = form
        self.tables = tuple(
            Table(self.device, ranked=False) for _ in range({"turn": 1, "shears": 3, "blocks": 4}[form])
        )

    def _gather(self, grouping: Grouping) -> pairs.InPlace:
        own = [_of_runs(table, grouping) for table in self.tables]
        if self._form == "turn":
            return own[0]
        if self._form == "shears":
            return pairs.Shears(*own)
        c1, s1, c2, s2 = own
        return c1, s1, c2, s2

    def _apply_(self, y: Tensor, x: Tensor, gathered: pairs.InPlace, grouping: Grouping) -> None:
        if grouping.runs is not None:
            for place, (first, last) in enumerate(grouping.runs):
                own = y[first:last]
                turned = pairs.rotate_(own, _of_place(gathered, place))
                if turned is not own:
                    own.copy_(turned)
            return
        own = y if grouping.tokens is None else y.index_select(0, grouping.tokens)
        turned = pairs.rotate_(own, gathered)
        if grouping.tokens is not None:
            y.index_copy_(0, grouping.tokens, turned)
        elif turned is not y:  # it was widened
            y.copy_(turned)


_KINDS = {"rows": _Rows, "columns": _Columns, "lora": _LowRank, "entries": _Entries, "bias": _Bias}


def patch_for(kind: str, device: torch.device, out_features: int, in_features: int) -> Patch:
    """An empty patch for parts of `kind`, see `store.parts`."""
    if kind in _KINDS:
        return _KINDS[kind](device, out_features, in_features)
    return _Rotation(kind.partition(":")[0], device, out_features, in_features)


def _of_tokens(table: Table, grouping: Grouping) -> Tensor:
    """(n, ...) what a table holds for every token; (1, ...) where all have one slot."""
    return _filled(table).index_select(0, grouping.tile_slots if grouping.together else grouping.slots)


def _of_runs(table: Table, grouping: Grouping) -> Tensor:
    """(M, ...) what a table holds for every run; without runs, `_of_tokens`."""
    if grouping.runs is None:
        return _of_tokens(table, grouping)
    return _filled(table).index_select(0, grouping.tile_slots)


def _of_place(gathered: pairs.InPlace, place: int) -> pairs.InPlace:
    """Of what `_of_runs` gathered, that of one run."""
    if isinstance(gathered, Tensor):
        return gathered[place]
    if isinstance(gathered, pairs.Shears):
        return pairs.Shears(gathered.a[place], gathered.b[place], gathered.d[place])
    c1, s1, c2, s2 = (entry[place] for entry in gathered)
    return c1, s1, c2, s2


def _filled(table: Table) -> Tensor:
    assert table.values is not None  # a patch without slots is not applied
    return table.values
