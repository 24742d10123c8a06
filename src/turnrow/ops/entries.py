"""W.flat[S] += delta: train n single entries of a weight matrix.

The ablation of the RoCoFT paper (Kowsher et al., ACL 2025, tables 11 and 12), which trains a share p of all entries. As in
`rows`, the parameter is the difference to the pretrained values.

Letters: W (out, in) weight; S (n,) int64, the chosen entries as row * in + column, ascending; delta (n,); x (..., in) input;
y (..., out) output of the linear layer; dy its gradient.

The gradient of an entry is a sum over tokens, d delta_k = sum dy[..., row_k] x[..., column_k]. It is taken from blocks of rows
of dW, each a matrix product that is given up again at once: the whole of dW is never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from turnrow.ops.delta import BeforeBackward, unviewed, without_autocast

__all__ = ["attach_gradient", "count", "dense", "keep", "overlay", "put_", "sampled_gradient", "shape"]

_BLOCKS = 8
"""dW is formed in that many pieces."""


def count(out_features: int, in_features: int, density: float) -> int:
    """How many entries a share of `density` is: at least one."""
    return max(1, round(density * out_features * in_features))


def shape(out_features: int, in_features: int, n: int) -> tuple[int, ...]:
    """Shape of `delta` for n entries: (n,)."""
    return (n,)


def keep(weight: Tensor, index: Tensor) -> Tensor:
    """A copy of the chosen entries, (n,), in the dtype of the weight."""
    return weight[_rows_and_columns(index, weight.shape[1])]


def put_(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Write the chosen entries, in place. `weight` may be a transposed view."""
    weight.index_put_(_rows_and_columns(index, weight.shape[1]), values)


def dense(delta: Tensor, index: Tensor, out_features: int, in_features: int) -> Tensor:
    """The change of the whole weight, (out, in), zero outside S; differentiable."""
    flat = delta.new_zeros(out_features * in_features).index_put((index,), delta)
    return flat.view(out_features, in_features)


def overlay(y: Tensor, x: Tensor, delta: Tensor, index: Tensor) -> Tensor:
    """y += x Delta^T, out of place: the adapter beside a base weight that is left alone.

    Delta is made dense for the length of the product, O(out * in) beside the O(tokens * out * in) of the product itself, and
    made again in the backward pass. Under a transform of `torch.func` it is kept, and derivatives of any order are right.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        change = dense(delta, index, y.shape[-1], x.shape[-1])
        return y + torch.nn.functional.linear(x.to(delta.dtype), change).to(y.dtype)
    return _EntryOverlay.apply(y, x, delta, index)


def attach_gradient(
    y: Tensor, x: Tensor, delta: Tensor, index: Tensor, before_backward: BeforeBackward = None
) -> Tensor:
    """Give `delta` its gradient where y was computed with W that already holds delta. Keeps x for the backward pass.

    Args:
        y: (..., out), fresh output of the linear layer; it is handed on in place.
        x: (..., in), input of the layer.
        delta: (n,), the parameter.
        index: (n,) int64, ascending.
        before_backward: called in the backward pass before W is read, which must then be what it was in the forward pass.

    Returns:
        y, now a function of delta for autograd.
    """
    whole = unviewed(y)
    attached = _EntryGradient.apply(whole, x, delta, index, before_backward)
    return attached if whole is y else attached.view(y.shape)


class _EntryGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, delta: Tensor, index: Tensor, before_backward: BeforeBackward
    ) -> Tensor:
        # delta is saved for the same reason as in rows: autograd's check that nothing changed it before the backward.
        ctx.save_for_backward(x, index, delta)
        ctx.mark_dirty(y)
        ctx.before_backward = before_backward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, index, delta = ctx.saved_tensors
        if ctx.before_backward is not None:
            ctx.before_backward()
        d_delta = sampled_gradient(dy, x, index).to(delta.dtype) if ctx.needs_input_grad[2] else None
        return dy, None, d_delta, None, None


class _EntryOverlay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta, index)
        change = dense(delta, index, y.shape[-1], x.shape[-1])
        return y + torch.nn.functional.linear(x.to(change.dtype), change).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, index = ctx.saved_tensors
        with without_autocast(dy):
            dx = None
            if ctx.needs_input_grad[1]:
                change = dense(delta, index, dy.shape[-1], x.shape[-1])
                dx = (dy.to(change.dtype) @ change).to(x.dtype)
            d_delta = sampled_gradient(dy, x, index).to(delta.dtype) if ctx.needs_input_grad[2] else None
        return dy, dx, d_delta, None


def _rows_and_columns(index: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    return torch.div(index, in_features, rounding_mode="floor"), index % in_features


def sampled_gradient(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """(dy^T x).flat[S], (n,), for dy (..., out), x (..., in) and S (n,) ascending; in the dtype of x."""
    with without_autocast(dy):
        dy = dy.reshape(-1, dy.shape[-1]).to(x.dtype)  # (tokens, out)
        x = x.reshape(-1, x.shape[-1])  # (tokens, in)
        pieces = [
            (dy[:, first:last].t() @ x).flatten()[inside - first * x.shape[1]]
            for first, last, inside in _row_blocks(index, dy.shape[1], x.shape[1])
        ]
    return torch.cat(pieces)


def _row_blocks(index: Tensor, out_features: int, in_features: int) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows with the chosen entries that lie in them: (first row, row after the last, part of the index).

    An index without values (FakeTensor) counts as evenly spread.
    """
    height = -(-out_features // _BLOCKS)
    starts = torch.arange(0, out_features + height, height, device=index.device) * in_features
    if isinstance(index, FakeTensor):
        positions = [len(index) * block // (len(starts) - 1) for block in range(len(starts))]
    else:
        positions = torch.searchsorted(index, starts).tolist()
    for block, (begin, end) in enumerate(pairwise(positions)):
        first = block * height
        if begin < end:
            yield first, min(first + height, out_features), index[begin:end]
