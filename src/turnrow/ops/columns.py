"""W[:, S] += delta: train r columns of a weight matrix.

RoCoFT (Kowsher et al., ACL 2025), equation 2, W = W0 + C with C zero outside r columns. As in `rows`, the parameter is the
difference to the pretrained columns.

Letters: W (out, in) weight; S (r,) int64, the chosen columns; delta (out, r); x (..., in) input; y (..., out) output of
the linear layer; dy its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnrow.ops.delta import BeforeBackward, unviewed, without_autocast
from turnrow.ops.tokens import token_product

__all__ = ["attach_gradient", "keep", "lora_factors", "others", "overlay", "put_", "shape", "spread"]


def shape(out_features: int, in_features: int, r: int) -> tuple[int, int]:
    """Shape of `delta` for r columns: (out, r). Its product is the number of trained parameters."""
    return out_features, r


def keep(weight: Tensor, index: Tensor) -> Tensor:
    """A copy of W[:, S], (out, r), in the dtype of the weight."""
    return weight.index_select(1, index)


def put_(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """W[:, S] = values, in place. `weight` may be a transposed view."""
    weight.index_copy_(1, index, values)


def others(rows: Tensor, out_features: int) -> Tensor:
    """The rows that are not in `rows`, ascending: (out - r,) int64."""
    taken = torch.zeros(out_features, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
    # A stable sort puts the free rows first. Unlike nonzero() its size is known, so nothing waits for a device.
    return taken.to(torch.uint8).argsort(stable=True)[: out_features - len(rows)]


def spread(delta: Tensor, rest: Tensor, out_features: int) -> Tensor:
    """Columns beside trained rows: the crossing belongs to the rows, so that it counts once and is moved once.

    Args:
        delta: (out - r, r), the columns without the rows that are trained themselves.
        rest: (out - r,), the rows that delta is for, see `others`.

    Returns:
        (out, r), zero in the trained rows; differentiable.
    """
    return delta.new_zeros(out_features, delta.shape[1]).index_copy(0, rest, delta)


def overlay(y: Tensor, x: Tensor, delta: Tensor, index: Tensor) -> Tensor:
    """y += x[..., S] delta^T, out of place: the adapter beside a base weight that is left alone.

    Costs O(tokens * out * r) and one copy of y; differentiable to any order. Computed in the dtype of x.
    """
    change = torch.nn.functional.linear(x.index_select(-1, index), delta.to(x.dtype))  # (..., out)
    return y + change.to(y.dtype)


def attach_gradient(
    y: Tensor, x: Tensor, delta: Tensor, index: Tensor, before_backward: BeforeBackward = None
) -> Tensor:
    """Give `delta` its gradient, d delta = dy^T x[..., S], where y was computed with W that already holds delta.

    The value of y does not change, and no gradient of the whole W is ever formed. Of x only the r chosen features are
    kept for the backward pass: r / in of what a trained W (or LoRA's A) has to keep.

    Args:
        y: (..., out), fresh output of the linear layer; it is handed on in place.
        x: (..., in), input of the layer.
        delta: (out, r), the parameter.
        index: (r,) int64.
        before_backward: called in the backward pass before W is read, which must then be what it was in the forward pass.

    Returns:
        y, now a function of delta for autograd.
    """
    whole = unviewed(y)
    attached = _ColumnGradient.apply(whole, x.detach().index_select(-1, index), delta, before_backward)
    return attached if whole is y else attached.view(y.shape)


def lora_factors(delta: Tensor, index: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B A the dense change of W, exactly: A (r, in) one-hot, B = delta (out, r)."""
    a = delta.new_zeros(len(index), in_features)
    a[torch.arange(len(index), device=index.device), index] = 1
    return a, delta


class _ColumnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x_s: Tensor, delta: Tensor, before_backward: BeforeBackward) -> Tensor:
        # delta is saved for the same reason as in rows: autograd's check that nothing changed it before the backward.
        ctx.save_for_backward(x_s, delta)
        ctx.mark_dirty(y)
        ctx.before_backward = before_backward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_s, delta = ctx.saved_tensors
        if ctx.before_backward is not None:
            ctx.before_backward()
        d_delta = None
        if ctx.needs_input_grad[2]:
            with without_autocast(dy):
                x_s = x_s.reshape(-1, x_s.shape[-1]).to(dy.dtype)
                # (x_s^T dy)^T: with r rows of output this order is several times faster than dy^T x_s, with r columns.
                d_delta = token_product(x_s, dy.reshape(-1, dy.shape[-1])).t().to(delta.dtype)
        return dy, None, d_delta, None
