"""W[S, :] += delta: train r rows of a weight matrix.

RoCoFT (Kowsher et al., ACL 2025), equation 2, W = W0 + R with R zero outside r rows. The paper trains the rows in place;
here the parameter is the difference `delta` to the pretrained rows, so that it starts at zero and weight decay pulls
towards the pretrained model.

Letters: W (out, in) weight; S (r,) int64, the chosen rows; delta (r, in); x (..., in) input; y (..., out) output of the
linear layer; dy its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnrow.ops.delta import BeforeBackward, unviewed, without_autocast
from turnrow.ops.tokens import token_product

__all__ = ["attach_gradient", "keep", "lora_factors", "overlay", "put_", "shape"]


def shape(out_features: int, in_features: int, r: int) -> tuple[int, int]:
    """Shape of `delta` for r rows: (r, in). Its product is the number of trained parameters."""
    return r, in_features


def keep(weight: Tensor, index: Tensor) -> Tensor:
    """A copy of W[S, :], (r, in), in the dtype of the weight."""
    return weight.index_select(0, index)


def put_(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """W[S, :] = values, in place. `weight` may be a transposed view."""
    weight.index_copy_(0, index, values)


def overlay(y: Tensor, x: Tensor, delta: Tensor, index: Tensor) -> Tensor:
    """y[..., S] += x delta^T, out of place: the adapter beside a base weight that is left alone.

    Costs O(tokens * in * r) and one copy of y; differentiable to any order. Computed in the dtype of x, so that what the
    backward pass keeps is x itself, which the base layer's neighbours keep as well, and no wider copy of it.
    """
    change = torch.nn.functional.linear(x, delta.to(x.dtype))  # (..., r)
    return y.index_add(-1, index, change.to(y.dtype))


def attach_gradient(
    y: Tensor, x: Tensor, delta: Tensor, index: Tensor, before_backward: BeforeBackward = None
) -> Tensor:
    """Give `delta` its gradient, d delta = dy[..., S]^T x, where y was computed with W that already holds delta.

    The value of y does not change, and no gradient of the whole W is ever formed. Keeps x for the backward pass (shared
    with every other layer that reads the same x).

    Args:
        y: (..., out), fresh output of the linear layer; it is handed on in place.
        x: (..., in), input of the layer.
        delta: (r, in), the parameter.
        index: (r,) int64.
        before_backward: called in the backward pass before W is read, which must then be what it was in the forward pass.

    Returns:
        y, now a function of delta for autograd.
    """
    whole = unviewed(y)
    attached = _RowGradient.apply(whole, x, delta, index, before_backward)
    return attached if whole is y else attached.view(y.shape)


def lora_factors(delta: Tensor, index: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B A the dense change of W, exactly: A = delta (r, in), B (out, r) one-hot."""
    b = delta.new_zeros(out_features, len(index))
    b[index, torch.arange(len(index), device=index.device)] = 1
    return delta, b


class _RowGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, delta: Tensor, index: Tensor, before_backward: BeforeBackward
    ) -> Tensor:
        # delta is not needed in the backward pass; saving it lets autograd notice when an optimizer changed it between
        # forward and backward, as it would notice for a weight.
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
        d_delta = None
        if ctx.needs_input_grad[2]:
            with without_autocast(dy):
                dy_s = dy.index_select(-1, index).to(x.dtype)  # (..., r)
                d_delta = token_product(dy_s.reshape(-1, dy_s.shape[-1]), x.reshape(-1, x.shape[-1])).to(delta.dtype)
        return dy, None, d_delta, None, None
