"""Products of gradients that are formed, a slice of their rows for many samples at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from turnrow.analysis.ntk.gram import Gram, Samples
from turnrow.analysis.ntk.store import FactorStore, Handle
from turnrow.analysis.ntk.token_factors import Load, TokenFactors
from turnrow.errors import UserError

__all__ = ["EntryFeatures", "Features", "Pick", "Space", "StoredVectors", "WeightFeatures", "by_slices"]

_STRIP = 512
"""Rows of a diagonal block of a Gram matrix that are computed at once, so that only its upper half is."""
_FEW = 8
"""Slices of fewer rows of a weight than this make slow products; rather fewer samples are taken at once."""
_CACHED = 2**24
"""Bytes of gradients that are written and read again soon: more would go out to memory and back."""
_LONG = 4096
"""Products over fewer numbers than this cost as much for adding up their results as for themselves."""


class Features(Protocol):
    """Gradients of one set of parameters, of which a slice can be asked for a batch."""

    length: int
    """Of what is sliced."""
    unit: int
    """Numbers that one place of a slice stands for, at most."""
    dtype: torch.dtype
    device: torch.device

    def count(self, begin: int, end: int) -> int:
        """Numbers in a slice."""

    def fill(self, batch: int, begin: int, end: int, out: Tensor) -> None:
        """Write the slice for a batch, (B, C, count)."""


class Space:
    """Memory that is taken again and again: touching new memory costs more than the products of short inputs."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(size,), with any values; what was taken before is overwritten."""
        if len(self._held) < size or self._held.dtype != dtype or self._held.device != device:
            self._held = torch.empty(0)
            self._held = torch.empty(size, dtype=dtype, device=device)
        return self._held[:size]


def by_slices(
    features: Features,
    samples: Samples,
    grams: Sequence[Gram],
    room: int,
    space: Space,
    sign: int = 1,
    picks: Sequence[Pick] = (),
) -> None:
    """Add the kernel of some parameters to the kernels that they are a part of, by slices of their gradients.

    Args:
        features: the gradients.
        samples: the batches.
        grams: where to add.
        room: bytes for the gradients of two groups of samples; there are as many groups as needed.
        space: where to put them.
        sign: -1 takes away.
        picks: some of the features that are other kernels' too.

    Raises:
        UserError: the smallest slice of one batch does not fit.
    """
    each = samples.classes * features.unit * features.dtype.itemsize
    largest = max(samples.sizes)
    half = room // 4  # for one of the two; as much for the products and their float64 copies
    if largest * each > half:
        raise UserError(
            f"block_bytes leaves {half} bytes for the gradients of a batch, which take {largest * each} for one row of a weight "
            f"({largest} samples, {samples.classes} outputs, {features.unit} numbers); give at least {16 * largest * each}, or smaller batches"
        )
    most = max(largest, half // (each * min(features.length, _FEW)))
    train, others = samples.tiles(most, train=True), samples.tiles(most, train=False)
    widest = max(sum(samples.sizes[b] for b in tile) for tile in (*train, *others))
    wanted = max(_CACHED // (widest * each), -(-_LONG // features.unit))
    step = max(1, min(features.length, wanted, half // (widest * each)))
    size = widest * samples.classes * features.unit * step
    height = max(1, min(_STRIP, half // (widest * samples.classes * (2 * features.dtype.itemsize + 8))))
    here, there = space.take(2 * size, features.dtype, features.device).view(2, -1)
    for number, tile in enumerate(train):
        for begin in range(0, features.length, step):
            end = min(begin + step, features.length)
            if features.count(begin, end) == 0:
                continue
            a = _filled(features, tile, samples, begin, end, here)
            parts = [(pick.of(a, begin, end), pick) for pick in picks]
            _multiply(a, None, grams, tile, tile, height, sign)
            for part, pick in parts:
                _multiply(part, None, pick.grams, tile, tile, height)
            for other in (*train[number + 1 :], *others):
                b = _filled(features, other, samples, begin, end, there)
                _multiply(a, b, grams, tile, other, height, sign)
                for part, pick in parts:
                    _multiply(part, pick.of(b, begin, end), pick.grams, tile, other, height)


def _multiply(
    a: Tensor, b: Tensor | None, grams: Sequence[Gram], first: range, second: range, height: int, sign: int = 1
) -> None:
    """Add a b^T, a strip at a time; without b the upper half of a a^T."""
    of = a if b is None else b
    for strip in range(0, len(of), height):
        product = a[strip : strip + height] @ a[strip:].T if b is None else a @ b[strip : strip + height].T
        for gram in grams:
            gram.add(first.start, second.start, product, strip if b is None else 0, strip, sign)


def _filled(features: Features, tile: range, samples: Samples, begin: int, end: int, space: Tensor) -> Tensor:
    """(samples C, count) of a tile, in the space given."""
    count = features.count(begin, end)
    total = sum(samples.sizes[b] for b in tile)
    whole = space[: total * samples.classes * count].view(total, samples.classes, count)
    at = 0
    for batch in tile:
        features.fill(batch, begin, end, whole[at : at + samples.sizes[batch]])
        at += samples.sizes[batch]
    return whole.view(-1, count)


class StoredVectors:
    """Features that were formed during the pass: for each batch (B, C, length) in pieces along the last dimension."""

    def __init__(
        self, store: FactorStore, pieces: Sequence[Sequence[Handle]], piece: int, length: int, like: Tensor
    ) -> None:
        self._store, self._pieces, self._piece = store, pieces, piece
        self.length, self.unit = length, 1
        self.dtype, self.device = like.dtype, like.device

    def count(self, begin: int, end: int) -> int:
        """As many as places."""
        return end - begin

    def fill(self, batch: int, begin: int, end: int, out: Tensor) -> None:
        """Copy from the pieces that the slice touches."""
        for number in range(begin // self._piece, -(-end // self._piece)):
            first = number * self._piece
            low, high = max(begin, first), min(end, first + self._piece)
            values = self._store.get(self._pieces[batch][number])
            out[..., low - begin : high - begin] = values[..., low - first : high - first]


class WeightFeatures:
    """D = G^T X, a slice of rows at a time."""

    def __init__(self, load: Load, shape: tuple[int, int], like: Tensor) -> None:
        self._load = load
        self.length, self.unit = shape
        self.dtype, self.device = like.dtype, like.device

    def count(self, begin: int, end: int) -> int:
        """Entries of D in some rows."""
        return (end - begin) * self.unit

    def fill(self, batch: int, begin: int, end: int, out: Tensor) -> None:
        """Write D for a batch."""
        _instantiate(self._load(batch), begin, end, out)


class Pick:
    """Some entries of D, picked where D is formed anyway."""

    def __init__(self, entries: Tensor, shape: tuple[int, int], grams: Sequence[Gram], device: torch.device) -> None:
        self._columns = shape[1]
        self._starts = torch.searchsorted(entries, torch.arange(shape[0] + 1) * shape[1]).tolist()
        self._entries = entries.to(device)
        self.grams = grams

    def of(self, rows: Tensor, begin: int, end: int) -> Tensor:
        """Those in some rows of D, from (samples C, rows in)."""
        return rows[:, self._entries[self._starts[begin] : self._starts[end]] - begin * self._columns]


class EntryFeatures:
    """Some entries of D, those in a slice of rows at a time."""

    def __init__(self, load: Load, shape: tuple[int, int], entries: Tensor, like: Tensor) -> None:
        self._load, self._columns = load, shape[1]
        self._starts = torch.searchsorted(entries, torch.arange(shape[0] + 1) * shape[1]).tolist()
        self._entries = entries.to(like.device)
        self.length = shape[0]
        self.unit = max(self.count(row, row + 1) for row in range(shape[0]))
        self.dtype, self.device = like.dtype, like.device

    def count(self, begin: int, end: int) -> int:
        """Chosen entries in some rows."""
        return self._starts[end] - self._starts[begin]

    def fill(self, batch: int, begin: int, end: int, out: Tensor) -> None:
        """Write the entries for a batch: each by itself where they are few, otherwise picked from D."""
        factors = self._load(batch)
        if factors.x is None or factors.g is None:
            out.zero_()
            return
        tokens = factors.x.shape[1]
        few = tokens * self.count(begin, end) < (end - begin) * self._columns
        # Neither way is more than a little held at once.
        each = (tokens * self.unit if few else self._columns) * out.shape[1] * len(out) * out.element_size()
        step = max(1, _CACHED // each)
        x = factors.x.permute(2, 0, 1).contiguous() if few else None  # (in, B, T): what is picked lies together
        for row in range(begin, end, step):
            last = min(row + step, end)
            first, stop = self._starts[row], self._starts[last]
            entries = self._entries[first:stop]
            part = out[..., first - self._starts[begin] : stop - self._starts[begin]]
            if x is not None:
                rows, columns = torch.div(entries, self._columns, rounding_mode="floor") - row, entries % self._columns
                g = factors.g[..., row:last].permute(3, 0, 1, 2).contiguous()  # (rows, B, C, T)
                part.copy_((g[rows] * x[columns][:, :, None]).sum(3).permute(1, 2, 0))
            else:
                whole = out.new_empty(len(out), out.shape[1], (last - row) * self._columns)
                _instantiate(factors, row, last, whole)
                part.copy_(whole[..., entries - row * self._columns])


def _instantiate(factors: TokenFactors, begin: int, end: int, out: Tensor) -> None:
    """D[begin:end] into out, (B, C, rows * in), contiguous."""
    x, g, ids, e = factors.x, factors.g, factors.ids, factors.e
    batch, classes, _ = out.shape
    rows = end - begin
    if x is not None and g is not None:
        # One of the two has to be copied: G in another order, or X, where it is small, once for each output.
        if x.shape[2] < rows:
            left = g.reshape(batch * classes, -1, g.shape[3])[..., begin:end].transpose(1, 2)  # (B C, rows, T)
            right = x[:, None].expand(-1, classes, -1, -1).reshape(batch * classes, -1, x.shape[2])
            torch.bmm(left, right, out=out.view(batch * classes, rows, -1))
        else:
            left = g[..., begin:end].transpose(2, 3).reshape(batch, classes * rows, -1)  # (B, C rows, T)
            torch.bmm(left, x, out=out.view(batch, classes * rows, -1))
    else:
        out.zero_()
    if ids is not None and e is not None:
        sample, token = ((ids >= begin) & (ids < end)).nonzero(as_tuple=True)
        place = (sample * classes)[:, None] + torch.arange(classes, device=ids.device)  # (tokens, C)
        place = place * rows + (ids[sample, token] - begin)[:, None]
        values = e[sample, :, token]  # (tokens, C, in)
        out.view(batch * classes * rows, -1).index_add_(0, place.flatten(), values.flatten(0, 1))
