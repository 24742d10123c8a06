"""A packed row of tokens, each with an adapter of its own that lies in a slot: the equations of serving.

`batched` serves samples of equal length; here the tokens of many requests lie one after the other, some requests with one token
(decoding), some with hundreds (reading a prompt). What the adapters trained lies in tables with a place for every slot, and a
`Grouping` says which token uses which slot. It is made once a step and serves every layer.

Products of a token with its own adapter's matrix are batched products over tiles: tokens of one slot, brought together and cut to
one length. When every request decodes, a tile is a token. When all tokens have one slot, it is an ordinary product. Where prompts
are read, the tokens of a request lie side by side: a few such runs are multiplied one after the other, where they lie.

Letters: n tokens with an adapter; s_i the slot of token i; x (n, in) input and y (n, out) output of the base layer; S slots;
r the largest rank. Nothing of size n * out * in is ever made; no gradients. y is always written in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Grouping",
    "add_columns_",
    "add_entries_",
    "add_low_rank_",
    "add_rows_",
    "group",
    "stack",
]

_TILES = (1, 4, 16, 64, 256)
"""Lengths of tiles to choose from."""

_COST_OF_MATRIX = 12
"""What it costs to bring one adapter's matrix to a tile, in tokens brought to a tile: 1.5 r of some r = 8."""

_SHORTEST_RUNS = {"cpu": 4}
"""Tokens that runs must have on average to be multiplied one by one. On a CPU of 512 to 2,752 features, r = 3 and 8, that takes a half
to a sixth of the time of tiles, for no token is copied; down to 4 tokens it is no slower."""
_SHORTEST_RUN = 64
"""The same elsewhere, where each product is a kernel to be launched."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which tokens of a row have which slot."""

    tokens: Tensor | None
    """(n,) int64 ascending, which tokens of the row; None for all of them."""
    slots: Tensor
    """(n,) int64."""
    tile_slots: Tensor
    """(M,) int64, the slot of every tile or run; one where all tokens have one slot."""
    tiles: Tensor | None
    """(M L,) int64, the tokens (of the n) in the tiles, some of them repeated to fill a tile up; None where a tile is a token or all."""
    places: Tensor | None
    """(n,) int64, where in `tiles` each token is; None with `tiles`."""
    length: int
    """L, the tokens in a tile; n where all tokens have one slot."""
    together: bool
    """Whether all tokens have one slot."""
    runs: tuple[tuple[int, int], ...] | None = None
    """The first token of the row in each run, and the one after the last; None with `tiles`, or where there are too many."""


def group(lengths: Sequence[int], slots: Sequence[int | None], device: torch.device) -> Grouping | None:
    """Group the tokens of a row of segments; None if no segment has a slot.

    Args:
        lengths: tokens of each segment, in the order of the row.
        slots: the slot of each segment, None where it has no adapter.
    """
    counts: dict[int, int] = {}
    for length, slot in zip(lengths, slots, strict=True):
        if slot is not None and length:
            counts[slot] = counts.get(slot, 0) + length
    if not counts:
        return None
    per_token = torch.tensor([-1 if slot is None else slot for slot in slots]).repeat_interleave(torch.tensor(lengths))
    tokens = None if all(slot is not None for slot in slots) else (per_token >= 0).nonzero().flatten()
    of_token = per_token if tokens is None else per_token[tokens]
    tiles = places = None
    runs = _runs(lengths, slots)
    shortest = _SHORTEST_RUNS.get(device.type, _SHORTEST_RUN)
    by_runs = len(counts) > 1 and len(of_token) >= shortest * len(runs)
    if len(counts) == 1:
        tile_slots, length = of_token[:1], len(of_token)
    elif by_runs:
        tile_slots, length = per_token[[first for first, _ in runs]], 1
    else:
        tile_slots, length = of_token, _tile_length(counts.values())
        if length > 1:
            tile_slots, tiles, places = _tiles(of_token, counts, length)
    return Grouping(
        None if tokens is None else tokens.to(device),
        of_token.to(device),
        tile_slots.to(device),
        None if tiles is None else tiles.to(device),
        None if places is None else places.to(device),
        length,
        together=len(counts) == 1,
        runs=tuple(runs) if by_runs else None,
    )


def _runs(lengths: Sequence[int], slots: Sequence[int | None]) -> list[tuple[int, int]]:
    """Where tokens of one slot lie side by side."""
    found: list[tuple[int, int]] = []
    last: int | None = None
    start = 0
    for length, slot in zip(lengths, slots, strict=True):
        if slot is not None and length:
            if found and slot == last and found[-1][1] == start:
                found[-1] = found[-1][0], start + length
            else:
                found.append((start, start + length))
            last = slot
        start += length
    return found


def _tiles(of_token: Tensor, counts: Mapping[int, int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The slots of the tiles, the tokens in them, and where in them every token is."""
    order = of_token.argsort(stable=True)
    each = torch.tensor([counts[slot] for slot in sorted(counts)])
    tiles_of_slot = (each + length - 1).div(length, rounding_mode="floor")
    # the places of a slot's tokens in the tiles are those of its first tile and after
    first_place = (tiles_of_slot.cumsum(0) - tiles_of_slot) * length
    first_token = each.cumsum(0) - each
    places_in_order = torch.arange(len(order)) + (first_place - first_token).repeat_interleave(each)
    tiles = torch.zeros(int(tiles_of_slot.sum()) * length, dtype=torch.int64)  # filled up with the first token
    tiles[places_in_order] = order
    places = torch.empty_like(order)
    places[order] = places_in_order
    return torch.tensor(sorted(counts)).repeat_interleave(tiles_of_slot), tiles, places


def _tile_length(counts: Iterable[int]) -> int:
    """The length of tiles that costs least: many short ones bring many matrices, few long ones are filled up with tokens."""
    numbers = list(counts)
    return min(_TILES, key=lambda length: sum(-(-n // length) * (length + _COST_OF_MATRIX) for n in numbers))


def stack(table: Tensor, rank: int, grouping: Grouping) -> Tensor:
    """The matrices of all tiles, (M, rank, width), of a table (S, r, width); what the functions below take.

    It is a copy, so that who decodes with the same requests for many steps makes it once.
    """
    return table[:, :rank].index_select(0, grouping.tile_slots)


# --- products --------------------------------------------------------------------------------------------------------


def _down(x: Tensor, matrices: Tensor, grouping: Grouping) -> Tensor:
    """t_i = D_{s_i} x_i, (n, r), for x of the row and D of the tiles (M, r, in)."""
    # in this order of the factors a product with few rows is two to four times as fast on a CPU as x D^T
    if grouping.runs is not None:
        each = [(own @ x[first:last].t()).t() for own, (first, last) in zip(matrices, grouping.runs, strict=True)]
        return torch.cat(each)
    x = _own(x, grouping)
    if grouping.together:
        return (matrices[0] @ x.t()).t()
    if grouping.tiles is None:
        # here a CPU runs along `in` for both, several times as fast as D x
        return torch.bmm(x.unsqueeze(1), matrices.mT).squeeze(1)
    tiled = x.index_select(0, grouping.tiles).view(len(matrices), grouping.length, -1)
    return torch.bmm(tiled, matrices.mT).flatten(0, 1).index_select(0, _known(grouping.places))


def _add_up_(y: Tensor, t: Tensor, matrices: Tensor, grouping: Grouping) -> None:
    """y_i += U_{s_i}^T t_i for y (all tokens of the row, out), t (n, r) and U of the tiles (M, r, out)."""
    if grouping.runs is not None:
        begin = 0
        for own, (first, last) in zip(matrices, grouping.runs, strict=True):
            y[first:last].addmm_(t[begin : begin + last - first], own)
            begin += last - first
    elif grouping.tokens is None and grouping.together:
        y.addmm_(t, matrices[0])
    elif grouping.tokens is None and grouping.tiles is None:
        y.unsqueeze(1).baddbmm_(t.unsqueeze(1), matrices)
    else:
        change = _up(t, matrices, grouping)
        if grouping.tokens is None:
            y.add_(change)
        else:
            y.index_add_(0, grouping.tokens, change)


def _up(t: Tensor, matrices: Tensor, grouping: Grouping) -> Tensor:
    if grouping.together:
        return t @ matrices[0]
    if grouping.tiles is None:
        return torch.bmm(t.unsqueeze(1), matrices).squeeze(1)
    tiled = t.index_select(0, grouping.tiles).view(len(matrices), grouping.length, -1)
    return torch.bmm(tiled, matrices).flatten(0, 1).index_select(0, _known(grouping.places))


def _own(values: Tensor, grouping: Grouping) -> Tensor:
    """The tokens of the row that have a slot."""
    return values if grouping.tokens is None else values.index_select(0, grouping.tokens)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # places are made with the tiles
    return tensor


# --- what adapters do to a layer -------------------------------------------------------------------------------------


def add_rows_(y: Tensor, x: Tensor, deltas: Tensor, at: Tensor, grouping: Grouping) -> None:
    """y[i, S_i] += delta_i x_i. O(n r in) multiplications; of y only r features a token are touched.

    Args:
        y: (tokens of the row, out), contiguous.
        x: (tokens of the row, in).
        deltas: (M, r, in), see `stack`.
        at: (n, r) int64, places in y laid flat: i out + the row of W.
    """
    y.view(-1).scatter_add_(0, at.flatten(), _down(x, deltas, grouping).flatten())


def add_columns_(y: Tensor, x: Tensor, deltas: Tensor, at: Tensor, grouping: Grouping) -> None:
    """y_i += x[i, S_i] delta_i^T. O(n r out) multiplications; of x only r features a token are read.

    Args:
        y: (tokens of the row, out), contiguous.
        x: (tokens of the row, in), contiguous.
        deltas: (M, r, out), see `stack`.
        at: (n, r) int64, places in x laid flat: i in + the column of W.
    """
    _add_up_(y, x.view(-1).take(at), deltas, grouping)


def add_low_rank_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, grouping: Grouping) -> None:
    """y_i += (alpha / r) B_i A_i x_i, the scale being in B. O(n r (in + out)) multiplications.

    Args:
        y: (tokens of the row, out), contiguous.
        x: (tokens of the row, in).
        a: (M, r, in), see `stack`.
        b: (M, r, out), B transposed.
    """
    _add_up_(y, _down(x, a, grouping), b, grouping)


def add_entries_(y: Tensor, x: Tensor, deltas: Tensor, rows: Tensor, columns: Tensor) -> None:
    """y[i, row] += delta x[i, column] over the entries of token i's adapter. O(n m) for m entries.

    Args:
        y: (tokens of the row, out), contiguous.
        x: (tokens of the row, in), contiguous.
        deltas: (n, m); zeros fill up where an adapter has fewer.
        rows: (n, m) int64, places in y laid flat.
        columns: (n, m) int64, places in x laid flat.
    """
    y.view(-1).scatter_add_(0, rows.flatten(), (x.view(-1).take(columns) * deltas).flatten())
