"""Gradients for the changes of experts' weights, where the weight already holds them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnrow.ops.delta import adapted
from turnrow.ops.experts.routing import Routing

__all__ = ["attach_gradient", "overlay", "whole_weight"]

Change = tuple[ModuleType, Tensor, Tensor]
"""One part of a change: its module here (`rows`, `columns` or `entries`), delta and index."""


def overlay(part: ModuleType, weight: Tensor, delta: Tensor, index: Tensor) -> Tensor:
    """A copy of W (E, out, in) with delta added, rounded once to the dtype of W; differentiable to any order."""
    return part.put(weight, index, adapted(part.keep(weight, index), delta))


def attach_gradient(part: ModuleType, y: Tensor, x: Tensor, delta: Tensor, index: Tensor, routing: Routing) -> Tensor:
    """Give `delta` its gradient where y was computed with W that already holds delta.

    The value of y does not change. No gradient of the whole W is formed, nor of the whole matrix of an expert.

    Args:
        part: `rows`, `columns` or `entries` of this package.
        y: (..., out), fresh output of the product of each token with the matrix of its expert; it is handed on in place.
        x: (..., in), the tokens, as many as y has and in the same order.
        delta: the parameter.
        index: (E, r) or (E, n) int64.
        routing: of the tokens.

    Returns:
        y, now a function of delta for autograd.
    """
    kept = part.keep_input(x.detach().reshape(-1, x.shape[-1]), index, routing)
    return _RoutedGradient.apply(y, kept, delta, index, routing.ends, routing.order, part)


def whole_weight(weight: Tensor, changes: Sequence[Change], *, transposed: bool) -> Tensor:
    """W itself, (E, out, in) as stored, which already holds the changes, as a function of them for autograd.

    Right for any use of W, and costs no copy of it. But autograd then forms the gradient of the whole W, of which the changes get
    their parts, and gives it up at once: one at a time is held in the backward pass.

    Args:
        weight: (E, out, in); with `transposed`, (E, in, out).
        changes: all parts that are trained.
        transposed: how `weight` is stored.
    """
    parts, deltas, indices = zip(*changes, strict=True)
    # In a list, so that autograd takes the result for new and not for a view of an argument that needs no gradient.
    return _WholeGradient.apply([weight], transposed, parts, *deltas, *indices)


class _RoutedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, kept: Tensor, delta: Tensor, index: Tensor, ends: Tensor, order: Tensor | None, part: Any
    ) -> Tensor:
        # delta is saved for autograd's check that nothing changed it before the backward, as in `turnrow.ops.rows`.
        ctx.save_for_backward(kept, index, ends, order, delta)
        ctx.part = part
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, index, ends, order, delta = ctx.saved_tensors
        d_delta = None
        if ctx.needs_input_grad[2]:
            if not len(kept):
                return dy, None, torch.zeros_like(delta), None, None, None, None
            with torch.autocast(dy.device.type, enabled=False):
                tokens = dy.reshape(len(kept), -1)
                d_delta = ctx.part.gradient(tokens, kept, index, Routing(ends, order)).to(delta.dtype)
        return dy, None, d_delta, None, None, None, None


class _WholeGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: list[Tensor], transposed: bool, parts: tuple[Any, ...], *deltas_and_indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*deltas_and_indices)
        ctx.transposed, ctx.parts = transposed, parts
        return weight[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.parts)
        deltas, indices = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        d_weight = d_weight.transpose(1, 2) if ctx.transposed else d_weight
        gradients = [
            part.keep(d_weight, index).to(delta.dtype)
            for part, delta, index in zip(ctx.parts, deltas, indices, strict=True)
        ]
        return None, None, None, *gradients, *(None for _ in indices)
