"""DII(b, s, R) = b + R^-1 (R s - R b): a state as it would be if a part of it came from another input.

Distributed interchange intervention (Geiger et al., CLeaR 2024, arXiv:2303.02536; in RoAd's paper, arXiv:2409.00119, section 3.3). b is the
state of a base input, s that of a source input, and only some coordinates z = R h are exchanged, those of the rows S of R:

    DII(b, s, R, S) = b + R^-1 M_S (R s - R b)        M_S zero but for ones on the diagonal at S

The papers take an orthogonal R and write R^T for R^-1. A map that also scales, as RoAd's R does, needs the inverse itself.
Several sources may give different parts at once: the terms add up, S_1, S_2, ... having no row in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turnrow.analysis.interchange.maps import Map
from turnrow.errors import UserError
from turnrow.ops.subspace import Subspace, subspace

__all__ = ["dii", "exchanged", "road_intervention", "rows_of"]


def dii(b: Tensor, s: Tensor, r: Map, rows: Subspace | None = None) -> Tensor:
    """DII(b, s, R, S) of states (..., d), in the dtype of b.

    Args:
        b, s: states of base and source.
        r: R.
        rows: S, as a list or a slice such as ``":50%"``; None is all of R, and gives s.
    """
    return exchanged(b, [(s, rows)], r)


def exchanged(b: Tensor, parts: Sequence[tuple[Tensor, Subspace | None]], r: Map) -> Tensor:
    """b with parts of several sources: b + R^-1 sum_k M_k (R s_k - R b), in the dtype of b.

    Args:
        b: (..., d).
        parts: (s_k, S_k), without a row in common; None is all rows.
        r: R.

    Raises:
        UserError: b is not of R's size; two parts have a row in common, or name one that is not there.
    """
    if b.shape[-1] != r.size:
        raise UserError(f"the states have {b.shape[-1]} features, the map is one of {r.size}")
    masks = rows_of([rows for _, rows in parts], r.size)
    z = r.into(b)
    change = torch.zeros_like(z)
    for (s, _), mask in zip(parts, masks, strict=True):
        change = change + mask.to(z) * (r.into(s.to(b)) - z)
    return b + r.back(change).to(b.dtype)


def road_intervention(h: Tensor, r: Map) -> Tensor:
    """Phi(h) = h + R (h - R^-1 h) = R h: RoAd seen as an intervention.

    It is DII with the map R^-1 and a source whose coordinates are h itself: DII(h, R h, R^-1). The paper writes R^T for R^-1, which is
    R h only where all scales are 1.

    Args:
        h: (..., d).
        r: R.
    """
    return h + r.into(h - r.back(h))


def rows_of(parts: Sequence[Subspace | None], size: int) -> list[Tensor]:
    """Bool (size,) for each part, which have no row in common.

    Raises:
        UserError: two have; a part names no row.
    """
    masks = []
    taken = torch.zeros(size, dtype=torch.bool)
    for number, part in enumerate(parts):
        mask = torch.ones(size, dtype=torch.bool)
        if part is not None:
            held = subspace(part, size, where=f"the rows of part {number}", what="rows")
            mask = torch.zeros(size, dtype=torch.bool).index_fill(0, held, True)
        if (taken & mask).any():
            row = int((taken & mask).nonzero()[0])
            raise UserError(
                f"part {number} and one before it both exchange row {row} of the map: give each its own rows"
            )
        taken |= mask
        masks.append(mask)
    return masks
