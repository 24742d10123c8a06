"""How far the pairs of a RoAd adapter were turned, and how much scaled."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from turnrow.ops import pairs

__all__ = ["Turning"]

_SHARES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Turning:
    """Angles and scales of the 2 x 2 blocks of one R, or of several."""

    count: int
    """Pairs."""
    moved: int
    """Pairs whose block is not the identity."""
    angle: dict[float, float]
    """How far the rotation nearest to each block turns, in rad without its sign: quantiles by share, 1.0 being the greatest."""
    scale: dict[float, float]
    """Of the two scales of each pair: quantiles by share, 0.0 being the least and 1.0 the greatest."""
    reflections: int
    """Blocks that turn a pair over."""
    angles: Tensor = field(repr=False, compare=False)
    """(pairs,) in rad, signed."""
    scales: Tensor = field(repr=False, compare=False)
    """(pairs, 2), greater first."""

    @classmethod
    def of(cls, blocks: pairs.Blocks) -> Turning:
        """Of the blocks of one R."""
        angle, larger, smaller = pairs.polar(blocks)
        return cls.joined(angle.flatten(), torch.stack((larger.flatten(), smaller.flatten()), 1))

    @classmethod
    def joined(cls, angles: Tensor, scales: Tensor) -> Turning:
        """Of angles (pairs,) and signed scales (pairs, 2)."""
        angles, scales = angles.detach().double().cpu(), scales.detach().double().cpu()
        moved = (angles.abs() > 1e-7) | ((scales - 1).abs() > 1e-7).any(1)
        absolute = scales.abs()
        return cls(
            len(angles),
            int(moved.sum()),
            {share: float(_quantile(angles.abs(), share)) for share in (*_SHARES, 1.0)},
            {share: float(_quantile(absolute, share)) for share in (0.0, *_SHARES, 1.0)},
            int((scales.prod(1) < 0).sum()),
            angles,
            scales,
        )


def _quantile(values: Tensor, share: float) -> Tensor:
    # Not torch.quantile, which takes 16 million numbers at most.
    ordered = values.flatten().sort().values
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
