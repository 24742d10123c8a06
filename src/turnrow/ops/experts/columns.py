"""W[e, :, S_e] += delta_e: train r columns of the matrix of every expert. delta is (E, out, r)."""

from __future__ import annotations

import torch
from torch import Tensor

from turnrow.ops.experts.routing import Routing, segment_product

__all__ = ["gradient", "keep", "keep_input", "lora_factors", "others", "put", "put_", "spread"]


def keep(weight: Tensor, index: Tensor) -> Tensor:
    """A copy of the chosen columns, (E, out, r), in the dtype of the weight."""
    return weight.gather(2, _along(index, weight))


def put_(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Write the chosen columns, in place. `weight` may be a transposed view."""
    weight.scatter_(2, _along(index, weight), values)


def put(weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of the weight with other values in the chosen columns; differentiable in both."""
    return weight.scatter(2, _along(index, weight), values)


def others(rows: Tensor, out_features: int) -> Tensor:
    """The rows of each expert that are not in `rows` (E, r), ascending: (E, out - r) int64."""
    taken = torch.zeros(len(rows), out_features, dtype=torch.bool, device=rows.device).scatter(1, rows, True)
    # A stable sort puts the free rows first. Unlike nonzero() its size is known, so nothing waits for a device.
    return taken.to(torch.uint8).argsort(dim=1, stable=True)[:, : out_features - rows.shape[1]]


def spread(delta: Tensor, rest: Tensor, out_features: int) -> Tensor:
    """Columns beside trained rows, (E, out - r, r), with zeros in those rows: (E, out, r). See `turnrow.ops.columns.spread`."""
    zeros = delta.new_zeros(len(delta), out_features, delta.shape[2])
    return zeros.scatter(1, rest.unsqueeze(2).expand_as(delta), delta)


def keep_input(x: Tensor, index: Tensor, routing: Routing) -> Tensor:
    """What of the inputs the gradient needs: of each token the r features of its expert, (tokens, r), sorted by expert."""
    return routing.sort(x).gather(1, index[routing.experts_of(len(x))])


def gradient(dy: Tensor, kept: Tensor, index: Tensor, routing: Routing) -> Tensor:
    """d delta_e = dy[tokens of e]^T x[tokens of e, S_e], (E, out, r).

    Args:
        dy: (tokens, out), gradient of the outputs, in the order of the tokens.
        kept: (tokens, r), from `keep_input`.
        index: (E, r) int64.
        routing: of the tokens.
    """
    return segment_product(kept.to(dy.dtype), routing.sort(dy), routing.ends).transpose(1, 2)


def lora_factors(delta: Tensor, index: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B_e A_e the change of each W_e, exactly: A (E, r, in) one-hot, B = delta (E, out, r)."""
    a = delta.new_zeros(len(index), index.shape[1], in_features)
    return a.scatter(2, index.unsqueeze(2), 1), delta


def _along(index: Tensor, weight: Tensor) -> Tensor:
    return index.unsqueeze(1).expand(-1, weight.shape[1], -1)
