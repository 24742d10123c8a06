"""Products of gradients, layer by layer, in bounded memory.

For a weight, samples i and j and outputs c and d, the kernel is <D_ic, D_jd> with D_ic = G_ic^T X_i. Two ways:

- *instantiate*: form D for many samples, a slice of its rows at a time, and multiply. C T in out operations a sample and
  C^2 in out a pair of samples.
- *tokens*: never form D: <G_ic^T X_i, G_jd^T X_j> = sum over tokens t, s of (x_it . x_js) (g_ict . g_jds).
  T^2 (in + C^2 out) a pair.

So short inputs, or layers that only one token of each sample matters to, are cheaper by tokens; `cheaper` says by how much.
An embedding is the same with a one-hot X in the place of G, of which nothing is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from turnrow.analysis.ntk.store import FactorStore, Handle
from turnrow.errors import UserError

__all__ = [
    "Contraction",
    "EntryFeatures",
    "Features",
    "Gram",
    "Load",
    "Pick",
    "Remembered",
    "Samples",
    "Space",
    "StoredVectors",
    "TokenFactors",
    "WeightFeatures",
    "by_slices",
    "by_tokens",
    "cheaper",
]

Contraction = Literal["auto", "instantiate", "tokens"]

_STRIP = 512
"""Rows of a diagonal block of a Gram matrix that are computed at once, so that only its upper half is."""
_FEW = 8
"""Slices of fewer rows of a weight than this make slow products; rather fewer samples are taken at once."""
_CACHED = 2**24
"""Bytes of gradients that are written and read again soon: more would go out to memory and back."""
_LONG = 4096
"""Products over fewer numbers than this cost as much for adding up their results as for themselves."""


@dataclass(frozen=True)
class Samples:
    """The batches in order, those of the training samples first."""

    sizes: tuple[int, ...]
    """Samples in each batch."""
    train_batches: int
    classes: int

    def start(self, batch: int) -> int:
        """The number of the first sample of a batch among the training samples, or among the others."""
        first = 0 if batch < self.train_batches else self.train_batches
        return sum(self.sizes[first:batch])

    @property
    def train(self) -> int:
        """Number of training samples."""
        return sum(self.sizes[: self.train_batches])

    @property
    def others(self) -> int:
        """Number of other samples."""
        return sum(self.sizes[self.train_batches :])

    def tiles(self, most: int, *, train: bool) -> list[range]:
        """Neighbouring batches of at most so many samples together, one batch at least."""
        first, last = (0, self.train_batches) if train else (self.train_batches, len(self.sizes))
        tiles: list[range] = []
        begin, held = first, 0
        for batch in range(first, last):
            if held and held + self.sizes[batch] > most:
                tiles.append(range(begin, batch))
                begin, held = batch, 0
            held += self.sizes[batch]
        return [*tiles, range(begin, last)] if last > first else []


class Gram:
    """The kernel of one method as it grows: float64, samples times outputs along each side, output fastest.

    Of the symmetric matrix of the training samples only what is on and above its diagonal blocks is filled.
    """

    def __init__(self, samples: Samples) -> None:
        n, m, c = samples.train, samples.others, samples.classes
        self.samples = samples
        self.train = np.zeros((n * c, n * c))
        self.others = np.zeros((m * c, n * c))

    def add(
        self, first: int, second: int, values: Tensor, shift: int = 0, shift_columns: int = 0, sign: int = 1
    ) -> None:
        """Add products of the outputs of neighbouring batches.

        Args:
            first: the batch, a training one, that the rows begin with.
            second: the batch that the columns begin with, not before it.
            values: (rows, columns).
            shift: rows that were left out at the beginning.
            shift_columns: likewise columns.
            sign: -1 takes away.
        """
        c = self.samples.classes
        row, column = self.samples.start(first) * c + shift, self.samples.start(second) * c + shift_columns
        block = values.to("cpu", torch.float64).numpy()
        add = np.add if sign > 0 else np.subtract
        if second < self.samples.train_batches:
            part = self.train[row : row + block.shape[0], column : column + block.shape[1]]
            add(part, block, out=part)
        else:
            part = self.others[column : column + block.shape[1], row : row + block.shape[0]]
            add(part, block.T, out=part)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, n, C, C) and (m, n, C, C)."""
        n, m, c = self.samples.train, self.samples.others, self.samples.classes
        whole = np.triu(self.train)
        whole += np.triu(self.train, 1).T
        train = whole.reshape(n, c, n, c).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(train), np.ascontiguousarray(self.others.reshape(m, c, n, c).transpose(0, 2, 1, 3))


# --- by slices of gradients ----------------------------------------------------------------------------------------------


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


@dataclass
class TokenFactors:
    """The factors of a weight for a batch: from linear layers, from embeddings that share it, or both."""

    x: Tensor | None = None
    """(B, T, in)"""
    g: Tensor | None = None
    """(B, C, T, out)"""
    ids: Tensor | None = None
    """(B, S) int64: row of the weight that each token looked up."""
    e: Tensor | None = None
    """(B, C, S, in): gradients of what was looked up."""

    @property
    def tokens(self) -> tuple[int, int]:
        """T and S."""
        return (0 if self.x is None else self.x.shape[1]), (0 if self.ids is None else self.ids.shape[1])

    @property
    def is_empty(self) -> bool:
        """Whether no output of the batch depends on the weight."""
        return self.x is None and self.ids is None


Load = Callable[[int], TokenFactors]
"""The factors of a batch, by its number."""


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


class Remembered:
    """What `load` returned last time, as long as it takes no more than some bytes in all."""

    def __init__(self, load: Load, limit: int) -> None:
        self._load, self._left = load, limit
        self._known: dict[int, TokenFactors] = {}

    def __call__(self, batch: int) -> TokenFactors:
        """The factors of a batch."""
        if batch in self._known:
            return self._known[batch]
        factors = self._load(batch)
        size = sum(t.nbytes for t in (factors.x, factors.g, factors.ids, factors.e) if t is not None)
        if size <= self._left:
            self._left -= size
            self._known[batch] = factors
        return factors


# --- by tokens -----------------------------------------------------------------------------------------------------------


def by_tokens(load: Load, samples: Samples, grams: Sequence[Gram], room: int, sign: int = 1) -> None:
    """Add the kernel of a weight to the kernels that it is a part of, without ever forming its gradients.

    Args:
        load: the factors of a batch.
        samples: the batches.
        grams: where to add.
        room: bytes for the products of tokens; a batch is taken in as many parts as needed.
        sign: -1 takes away.
    """
    for p in range(samples.train_batches):
        first = load(p)
        if first.is_empty:
            continue
        for q in range(p, len(samples.sizes)):
            second = load(q)
            if second.is_empty:
                continue
            for begin, part in _parts(first, second, samples.classes, room):
                for begin_columns, other in _parts(second, part, samples.classes, room):
                    block = _token_products(part, other)
                    for gram in grams:
                        gram.add(p, q, block, begin * samples.classes, begin_columns * samples.classes, sign)


def _parts(factors: TokenFactors, other: TokenFactors, classes: int, room: int) -> Iterator[tuple[int, TokenFactors]]:
    """A batch in parts so small that their products with another batch fit: (first sample, part)."""
    held = next(t for t in (factors.e, factors.g) if t is not None)
    others = next(t for t in (other.e, other.g) if t is not None)
    # Products of tokens for every pair of outputs, and one more while they are multiplied.
    each = 2 * classes**2 * max(factors.tokens) * len(others) * max(other.tokens) * held.element_size()
    step = max(1, min(len(held), room // max(1, each)))
    for begin in range(0, len(held), step):
        of = slice(begin, begin + step)
        x, g, ids, e = (None if t is None else t[of] for t in (factors.x, factors.g, factors.ids, factors.e))
        yield begin, TokenFactors(x, g, ids, e)


def _token_products(p: TokenFactors, q: TokenFactors) -> Tensor:
    """(B_p C, B_q C)."""
    total: Tensor | None = None
    if p.x is not None and p.g is not None and q.x is not None and q.g is not None:
        total = _summed(_gram(p.g, q.g), _gram(p.x[:, None], q.x[:, None]))
    if p.ids is not None and p.e is not None and q.ids is not None and q.e is not None:
        same = (p.ids[:, None, :, None, None, None] == q.ids[None, None, None, :, None, :]).to(p.e.dtype)
        total = _plus(total, _summed(_gram(p.e, q.e), same))
    if p.x is not None and p.g is not None and q.ids is not None and q.e is not None:
        total = _plus(total, _crossed(p.x, p.g, q.ids, q.e))
    if q.x is not None and q.g is not None and p.ids is not None and p.e is not None:
        total = _plus(total, _crossed(q.x, q.g, p.ids, p.e).permute(2, 3, 0, 1))
    if total is None:
        raise RuntimeError("there are no factors")
    return total.reshape(total.shape[0] * total.shape[1], -1)


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """(B, C, T, B', C', T'): products of all vectors of two batches."""
    product = left.reshape(-1, left.shape[-1]) @ right.reshape(-1, right.shape[-1]).T
    return product.view(*left.shape[:3], *right.shape[:3])


def _summed(of_gradients: Tensor, of_inputs: Tensor) -> Tensor:
    """Sum over tokens of the product, (B, C, B', C')."""
    return of_gradients.mul_(of_inputs).sum((2, 5))


def _crossed(x: Tensor, g: Tensor, ids: Tensor, e: Tensor) -> Tensor:
    """<G^T X, D of an embedding>: sum over t, s of G[t, id_s] (x_t . e_s), (B, C, B', C')."""
    chosen = g[..., ids]  # (B, C, T, B', S)
    products = _gram(x[:, None], e).squeeze(1)  # (B, T, B', C', S)
    return torch.einsum("bctps,btpds->bcpd", chosen, products)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


# --- which of the two ----------------------------------------------------------------------------------------------------

_PASS = 8.0
"""What touching a product of tokens once more costs, in multiplications."""


def cheaper(tokens: Sequence[tuple[int, int]], shape: tuple[int, int], samples: Samples) -> Contraction:
    """The way with the fewer multiplications, given the T and S of every batch and the rows and columns of the weight."""
    rows, columns = shape
    c = samples.classes
    form = pair_up = token_pairs = 0.0
    for p, size in enumerate(samples.sizes):
        form += size * c * (tokens[p][0] + 1) * rows * columns
        if p >= samples.train_batches:
            continue
        for q in range(p, len(samples.sizes)):
            pairs = size * samples.sizes[q] / (2 if p == q else 1)
            pair_up += pairs * c**2 * rows * columns
            linear = tokens[p][0] * tokens[q][0] * (columns + c**2 * (rows + _PASS))
            looked_up = tokens[p][1] * tokens[q][1] * c**2 * (columns + _PASS)
            crossed = (tokens[p][0] * tokens[q][1] + tokens[p][1] * tokens[q][0]) * c * (columns + c * _PASS)
            # A diagonal pair of batches is computed whole.
            token_pairs += size * samples.sizes[q] * (linear + looked_up + crossed)
    return "tokens" if token_pairs < form + pair_up else "instantiate"
