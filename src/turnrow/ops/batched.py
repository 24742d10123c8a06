"""A batch in which every sample has an adapter of its own: the equations of the other modules, each once for the whole batch.

What the adapters of a batch trained is stacked along the samples first (`stack_*`), then applied to the output of the base
layer (`add_*`, `rotate`). Stacking costs one copy of the adapters' values, so a caller who decodes token by token stacks once.
A sample without an adapter gets zeros, or the identity.

Letters: B samples; T tokens a sample; x (B, T, in) input and y, h (B, T, out) output of the base layer; S_b and delta_b
what the adapter of sample b trained. Nothing of size B * out * in is ever made.

Where no gradient is asked for, y is written in place and given back. Otherwise every function is made of differentiable
operations: gradients reach each sample's own adapter, so several adapters can be trained in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad
from torch.nn.utils.rnn import pad_sequence

from turnrow.ops import pairs

__all__ = [
    "Angles",
    "Chosen",
    "Columns",
    "Entries",
    "Rotations",
    "Rows",
    "add_bias",
    "add_columns",
    "add_entries",
    "add_rows",
    "rotate",
    "stack_columns",
    "stack_entries",
    "stack_rotations",
    "stack_rows",
]

Chosen = tuple[Tensor, Tensor]
"""(delta, index) as `rows`, `columns` or `entries` take them."""

_LEAST_TOKENS = 4
"""Fewer than four numbers a vector take the slow path of `embedding_bag` on a CPU."""


# --- rows: y[b, :, S_b] += x_b delta_b^T -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of every sample's adapter; adapters of lower rank are filled up with rows of zeros."""

    delta: Tensor
    """(B, r, in)"""
    index: Tensor
    """(B, r) int64"""


def stack_rows(chosen: Sequence[Chosen | None], dtype: torch.dtype) -> Rows | None:
    """Stack (delta (r_b, in), index (r_b,)) of the samples, None where a sample has none; None if no sample has any."""
    deltas, indices = _filled(chosen)
    return Rows(_stack(deltas).to(dtype), _stack(indices)) if deltas else None


def add_rows(y: Tensor, x: Tensor, rows: Rows) -> Tensor:
    """y[b, :, S_b] += x_b delta_b^T. O(B T r in) multiplications.

    Args:
        y: (B, T, out), in the dtype of `rows`.
        x: (B, T, in).
    """
    # delta x^T: in this order a CPU runs over the long side of both, four times as fast for 16 tokens as x delta^T.
    change = torch.bmm(rows.delta, x.to(y.dtype).transpose(1, 2))  # (B, r, T)
    index = rows.index.unsqueeze(2).expand_as(change)
    if _asks_for_gradient(y, change):
        return y.transpose(1, 2).scatter_add(1, index, change).transpose(1, 2)
    y.transpose(1, 2).scatter_add_(1, index, change)
    return y


# --- columns: y_b += x_b[:, S_b] delta_b^T ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of every sample's adapter; adapters of lower rank are filled up with columns of zeros."""

    delta: Tensor
    """(B, r, out), the transpose of what `columns` takes"""
    index: Tensor
    """(B, r) int64"""


def stack_columns(chosen: Sequence[Chosen | None], dtype: torch.dtype) -> Columns | None:
    """Stack (delta (out, r_b), index (r_b,)) of the samples, None where a sample has none; None if no sample has any."""
    deltas, indices = _filled([None if one is None else (one[0].t(), one[1]) for one in chosen])
    return Columns(_stack(deltas).to(dtype), _stack(indices)) if deltas else None


def add_columns(y: Tensor, x: Tensor, columns: Columns) -> Tensor:
    """y_b += x_b[:, S_b] delta_b^T. O(B T r out) multiplications.

    Args:
        y: (B, T, out), in the dtype of `columns`.
        x: (B, T, in).
    """
    x_s = x.gather(2, columns.index.unsqueeze(1).expand(-1, x.shape[1], -1)).to(y.dtype)  # (B, T, r)
    if _asks_for_gradient(y, x_s, columns.delta):
        return torch.baddbmm(y, x_s, columns.delta)
    return y.baddbmm_(x_s, columns.delta)


# --- entries: y[b, :, row] += delta x[b, :, column] ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entries:
    """Single entries of every sample's adapter as one sparse matrix, (B out, B in), in blocks along its diagonal."""

    delta: Tensor
    """(n,) of all samples, in at least float32"""
    column: Tensor
    """(n,) int32 or int64, b * in + column"""
    starts: Tensor
    """(B out + 1,) in the same dtype: entries starts[k] to starts[k + 1] lie in row k = b * out + row."""


def stack_entries(chosen: Sequence[Chosen | None], out_features: int, in_features: int) -> Entries | None:
    """Join (delta (n_b,), index (n_b,) ascending) of the samples, None where a sample has none; None if no sample has any."""
    present = [(sample, *one) for sample, one in enumerate(chosen) if one is not None]
    if not present:
        return None
    samples, deltas, indices = zip(*present, strict=True)
    index = torch.cat(indices)
    lengths = torch.tensor([len(one) for one in indices], device=index.device)
    owner = torch.tensor(samples, device=index.device).repeat_interleave(lengths, output_size=len(index))
    row = owner * out_features + torch.div(index, in_features, rounding_mode="floor")
    starts = torch.searchsorted(row, torch.arange(len(chosen) * out_features + 1, device=index.device))
    column = owner * in_features + index % in_features
    small = max(len(index), len(chosen) * in_features) < 2**31
    narrow = torch.int32 if small else torch.int64  # half the memory beside values in float32
    return Entries(torch.cat(deltas), column.to(narrow), starts.to(narrow))


def add_entries(y: Tensor, x: Tensor, entries: Entries) -> Tensor:
    """y[b, :, row] += delta x[b, :, column] over the entries of sample b. O(T n) multiplications for n entries in all.

    Args:
        y: (B, T, out).
        x: (B, T, in).
    """
    samples, tokens, in_features = x.shape
    by_feature = x.to(entries.delta.dtype).transpose(1, 2).reshape(samples * in_features, tokens)
    if tokens < _LEAST_TOKENS:
        by_feature = pad(by_feature, (0, _LEAST_TOKENS - tokens))
    # A weighted sum of vectors, one for each row of the matrix: what this function is for.
    change = embedding_bag(
        entries.column,
        by_feature,
        entries.starts,
        mode="sum",
        per_sample_weights=entries.delta,
        include_last_offset=True,
    )  # (B out, T)
    change = change[:, :tokens].reshape(samples, -1, tokens).transpose(1, 2).to(y.dtype)
    return y + change if _asks_for_gradient(y, change) else y.add_(change)


# --- bias: y_b += bias_b ---------------------------------------------------------------------------------------------


def add_bias(y: Tensor, bias: Tensor, dim: int) -> Tensor:
    """y_b += bias_b.

    Args:
        y: (B, ...), in the dtype of `bias`.
        bias: (B, *shape), a difference to the bias of the layer for each sample.
        dim: dimension of y where `shape` begins.
    """
    change = bias.unflatten(0, (len(bias), *(1,) * (dim - 1)))
    change = change[(..., *(None,) * (y.dim() - change.dim()))]
    return y + change if _asks_for_gradient(y, bias) else y.add_(change)


# --- rotation: z_b = R_b h_b -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Angles:
    """Parameters of the samples whose adapters are of one variant and group size."""

    variant: pairs.Variant
    group_size: int
    samples: Sequence[int]
    """Which samples of the batch."""
    theta: Sequence[Tensor]
    """One for each of `samples`, see `pairs.coefficients`."""
    alpha: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Rotations:
    """R of the samples of one group size g."""

    samples: Tensor | None
    """(b,) int64, which samples; None for all, R being the identity where a sample has no rotation."""
    blocks: pairs.Blocks
    """(c1, s1, c2, s2), each (b, 1, out / g, g / 2)."""
    in_place: pairs.InPlace
    """The same for where no gradient is asked for."""


def stack_rotations(angles: Sequence[Angles], samples: int, out_features: int) -> list[Rotations]:
    """R of all samples of a batch of `samples`, by group size.

    Args:
        angles: one for each variant and group size in the batch; a sample that is in none is not rotated.
    """
    by_size: dict[int, list[tuple[Tensor, ...]]] = {}
    for one in angles:
        # Groups lie side by side, so many adapters of a kind are one long adapter.
        theta, alpha = torch.cat(list(one.theta)), torch.cat(list(one.alpha))
        shape = (len(one.samples), 1, out_features // one.group_size, one.group_size // 2)
        entries = (entry.view(shape) for entry in pairs.coefficients(one.variant, one.group_size, theta, alpha))
        which = torch.tensor(one.samples, device=theta.device)
        by_size.setdefault(one.group_size, []).append((which, *entries))
    kinds = []
    one_block = all(one.variant == "road_1" for one in angles)
    for parts in by_size.values():
        which, c1, s1, c2, s2 = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if len(by_size) == 1:
            identity = c1.new_ones(samples, *c1.shape[1:]), c1.new_zeros(samples, *c1.shape[1:])
            c1, c2 = (identity[0].index_copy(0, which, entry) for entry in (c1, c2))
            s1, s2 = (identity[1].index_copy(0, which, entry) for entry in (s1, s2))
        blocks = (c1, s1, c1, s1) if one_block else (c1, s1, c2, s2)  # equal ones are read from memory once
        in_place = blocks if _asks_for_gradient(*blocks) else pairs.prepare(blocks)
        kinds.append(Rotations(None if len(by_size) == 1 else which, blocks, in_place))
    return kinds


def rotate(h: Tensor, rotations: Sequence[Rotations]) -> Tensor:
    """z_b = R_b h_b, O(B T out).

    Args:
        h: (B, T, out).

    Returns:
        (B, T, out) in the dtype of h; computed in the wider dtype of h and the parameters.
    """
    h = h.contiguous()
    for kind in rotations:
        own = h if kind.samples is None else h.index_select(0, kind.samples)
        in_place = not _asks_for_gradient(own, *kind.blocks)
        z = pairs.rotate_(own, kind.in_place) if in_place else pairs.rotate(own, kind.blocks)
        if kind.samples is None:
            h = z
        else:
            h = h.index_copy_(0, kind.samples, z) if in_place else h.index_copy(0, kind.samples, z)
    return h


def _filled(chosen: Sequence[Chosen | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Deltas and indices of all samples, empty ones for those that have none; two empty lists if no sample has any."""
    some = next((one for one in chosen if one is not None), None)
    if some is None:
        return [], []
    nothing = some[0].detach().new_empty(0, some[0].shape[1]), some[1].new_empty(0)
    deltas, indices = zip(*(one or nothing for one in chosen), strict=True)
    return list(deltas), list(indices)


def _stack(tensors: list[Tensor]) -> Tensor:
    """Stack tensors that may differ in length, the shorter ones filled up with zeros."""
    if all(len(tensor) == len(tensors[0]) for tensor in tensors):
        return torch.stack(tensors)
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    return pad_sequence([tensor.to(widest) for tensor in tensors], batch_first=True)


def _asks_for_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
