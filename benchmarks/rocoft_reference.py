"""Algorithm 1 of the RoCoFT paper (appendix C), the yardstick for what a plain implementation costs.

Written from the printed algorithm: the r chosen rows (columns) are a parameter, the others a buffer, and every forward
concatenates them to a whole weight. Two departures: the algorithm as printed joins rows along dim 1, where the shapes
do not fit, so rows are joined along dim 0 here; and biases stay frozen, so that it trains what our own rows and columns
train, and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ReferenceColumns", "ReferenceRows"]


class _Reference(nn.Module):
    """y = x [trained; frozen]^T + b, the whole weight put together at every call."""

    dim: int
    frozen: Tensor

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        trained, frozen = linear.weight.detach().split([r, linear.weight.shape[self.dim] - r], dim=self.dim)
        self.trained = nn.Parameter(trained.clone())
        self.register_buffer("frozen", frozen.clone())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.trained, self.frozen], dim=self.dim)  # (out, in)
        return functional.linear(x, weight, self.bias)


class ReferenceRows(_Reference):
    """The first `r` rows of the weight are trained: parameter (r, in)."""

    dim = 0


class ReferenceColumns(_Reference):
    """The first `r` columns of the weight are trained: parameter (out, r)."""

    dim = 1
