"""W[e, S_e, :] += delta_e: train r rows of the matrix of every expert. delta is (E, r, in)."""

from __future__ import annotations

from torch import Tensor

from turnrow.ops.experts.routing import Routing, segment_product

__all__ = ["gradient", "keep", "keep_input", "lora_factors", "put", "put_"]


def keep(weight: Tensor, index: Tensor) -> Tensor:
    """A copy of the chosen rows, (E, r, in), in the dtype of the weight."""
    return weight.gather(1, _along(index, weight))


def put_(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Write the chosen rows, in place. `weight` may be a transposed view."""
    weight.scatter_(1, _along(index, weight), values)


def put(weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of the weight with other values in the chosen rows; differentiable in both."""
    return weight.scatter(1, _along(index, weight), values)


def keep_input(x: Tensor, index: Tensor, routing: Routing) -> Tensor:
    """What of the inputs the gradient needs: all, (tokens, in), shared with every other layer that reads them."""
    return x


def gradient(dy: Tensor, kept: Tensor, index: Tensor, routing: Routing) -> Tensor:
    """d delta_e = dy[tokens of e, S_e]^T x[tokens of e], (E, r, in).

    Args:
        dy: (tokens, out), gradient of the outputs, in the order of the tokens.
        kept: (tokens, in), from `keep_input`.
        index: (E, r) int64.
        routing: of the tokens.
    """
    dy = routing.sort(dy)
    dy_s = dy.gather(1, index[routing.experts_of(len(dy))])  # (tokens, r)
    return segment_product(dy_s.to(kept.dtype), routing.sort(kept), routing.ends)


def lora_factors(delta: Tensor, index: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B_e A_e the change of each W_e, exactly: A = delta (E, r, in), B (E, out, r) one-hot."""
    b = delta.new_zeros(len(index), index.shape[1], out_features)
    return delta, b.scatter(2, index.unsqueeze(2), 1).transpose(1, 2)


def _along(index: Tensor, weight: Tensor) -> Tensor:
    return index.unsqueeze(2).expand(-1, -1, weight.shape[2])
