"""W[e].flat[S_e] += delta_e: train n single entries of the matrix of every expert. delta is (E, n).

S (E, n) holds row * in + column, ascending for each expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turnrow.ops import entries
from turnrow.ops.experts.routing import Routing

__all__ = ["gradient", "keep", "keep_input", "put", "put_"]


def keep(weight: Tensor, index: Tensor) -> Tensor:
    """A copy of the chosen entries, (E, n), in the dtype of the weight."""
    return weight[_positions(index, weight)]


def put_(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Write the chosen entries, in place. `weight` may be a transposed view."""
    weight.index_put_(_positions(index, weight), values)


def put(weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of the weight with other values in the chosen entries; differentiable in both."""
    return weight.index_put(_positions(index, weight), values)


def keep_input(x: Tensor, index: Tensor, routing: Routing) -> Tensor:
    """What of the inputs the gradient needs: all, (tokens, in), shared with every other layer that reads them."""
    return x


def gradient(dy: Tensor, kept: Tensor, index: Tensor, routing: Routing) -> Tensor:
    """d delta_ek = the sum of dy[token, row_k] x[token, column_k] over the tokens of e, (E, n); as in `turnrow.ops.entries`.

    Args:
        dy: (tokens, out), gradient of the outputs, in the order of the tokens.
        kept: (tokens, in), from `keep_input`.
        index: (E, n) int64.
        routing: of the tokens.
    """
    dy, x = routing.sort(dy), routing.sort(kept)
    segments = routing.segments()
    return torch.stack(
        [entries.sampled_gradient(dy[i:j], x[i:j], s) for (i, j), s in zip(segments, index, strict=True)]
    )


def _positions(index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    expert = torch.arange(len(index), device=index.device).unsqueeze(1).expand_as(index)
    in_features = weight.shape[2]
    return expert, torch.div(index, in_features, rounding_mode="floor"), index % in_features
