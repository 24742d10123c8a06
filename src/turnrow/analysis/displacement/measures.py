"""How far a hidden state moved: by its length, and by its direction.

The two measures of RoAd's pilot study (Liao et al., NeurIPS 2024, arXiv:2409.00119, section 3), of a state x0 of the base and
the state x of the adapted model for the same token:

    dM = | ||x|| - ||x0|| | / ||x0||        relative change of magnitude
    dD = cos(x, x0)                         angular change; the smaller, the further turned

Computed in float64. What is kept is the turn 1 - dD, as half the squared distance of the two directions, because the cosine of two
nearly equal directions is 1 but for digits that float32 does not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["angular_change", "magnitude_change", "turn"]


def magnitude_change(x: Tensor, x0: Tensor) -> Tensor:
    """dM of states (..., d): (...) float64; NaN where x0 is zero."""
    before = torch.linalg.vector_norm(x0, dim=-1, dtype=torch.float64)
    after = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return torch.where(before > 0, (after - before).abs() / before, torch.nan)


def angular_change(x: Tensor, x0: Tensor) -> Tensor:
    """dD of states (..., d): (...) float64 from -1 to 1; NaN where one of them is zero."""
    return 1 - turn(x, x0)


def turn(x: Tensor, x0: Tensor) -> Tensor:
    """1 - dD of states (..., d): (...) float64, 0 for the same direction, 2 for the opposite; NaN where one of them is zero."""
    directions = [v.double() / torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=torch.float64) for v in (x, x0)]
    return (directions[0] - directions[1]).square().sum(-1) / 2
