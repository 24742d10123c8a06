"""How far fine-tuning moved a weight: norms, singular values, ranks; which rows; how far pairs were turned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turnrow.analysis.explain.turning import Turning
from turnrow.ops import pairs

__all__ = ["MovedPart", "WeightMovement", "effective_rank", "measure", "singular_values"]

_LISTED = 64
"""Singular values and moved rows that are kept."""
_EXACT = 1024
"""Up to this many rows or columns, whichever are fewer, all singular values are computed; beyond it the greatest 64."""


@dataclass(frozen=True)
class MovedPart:
    """The rows, columns or entries of a weight that RoCoFT trained."""

    count: int
    indices: list[int]
    """Those that moved furthest, furthest first; entries as row * in + column."""
    norms: list[float]
    """How far each of them moved."""
    relative: list[float] | None
    """The same over the norm of what was there; None where the base is not known."""


@dataclass(frozen=True)
class WeightMovement:
    """What changed in one weight."""

    name: str
    shape: list[int] | None
    norm: float | None
    """Frobenius norm of the change; None where it is not known without the base (RoAd)."""
    before: float | None
    """Frobenius norm of the weight before; None where the base is not known."""
    relative: float | None
    """`norm` over `before`; None where the base is not known, or where it was zero."""
    spectral: float | None
    """The greatest singular value."""
    singular_values: list[float] = field(default_factory=list)
    """The greatest, at most 64."""
    effective_rank: float | None = None
    """See `effective_rank`; None where not all singular values are known."""
    stable_rank: float | None = None
    """(norm / spectral)²: how many singular values as great as the greatest would give the norm."""
    parts: dict[str, MovedPart] = field(default_factory=dict)
    """RoCoFT: by ``row``, ``column``, ``entry``."""
    turning: Turning | None = None
    """RoAd: how far the pairs were turned and scaled."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is no bias, and no weight of a norm."""
        return self.shape is None or len(self.shape) > 1


@torch.no_grad()
def measure(
    name: str,
    delta: Tensor | tuple[Tensor, Tensor] | None,
    weight: Tensor | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    parts: Mapping[str, Tensor] | None = None,
    blocks: pairs.Blocks | None = None,
) -> WeightMovement:
    """Measure what changed in one weight.

    Args:
        name: of the weight.
        delta: the change, (out, in) or (out,), or factors B (out, r) and A (r, in) whose product it is; None where it is not known.
        weight: what was there before.
        shape: of the weight, where it is known.
        parts: indices of the rows, columns or entries that could change, by ``row``, ``column``, ``entry``.
        blocks: of RoAd's R.
    """
    turning = None if blocks is None else Turning.of(blocks)
    sizes = None if shape is None else list(shape)
    if delta is None:
        return WeightMovement(name, sizes, None, None, None, None, turning=turning)
    values, all_known = singular_values(delta)
    # Of factors that are no rows or columns the sum over all singular values is the norm.
    dense = delta if isinstance(delta, Tensor) else None
    norm = float(torch.linalg.vector_norm(values if dense is None else dense.double()))
    before = None if weight is None else float(torch.linalg.vector_norm(weight, dtype=torch.float32))
    spectral = float(values[0]) if len(values) else 0.0
    return WeightMovement(
        name,
        sizes,
        norm,
        before,
        norm / before if before else None,
        spectral,
        values[:_LISTED].tolist(),
        effective_rank(values) if all_known else None,
        (norm / spectral) ** 2 if spectral else 0.0,
        {part: _moved(part, index, delta, weight) for part, index in (parts or {}).items()},
        turning,
    )


def singular_values(delta: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, bool]:
    """Singular values of a change, float64, descending, and whether these are all that are not zero.

    Of factors by QR, O((out + in) r²). Of a dense change from the smaller of its two Gram matrices, exact to 1e-8 of the greatest; where even that has
    more than 1024 rows, the greatest 64 by random projection (Halko, Martinsson and Tropp, SIAM Review 2011).

    Args:
        delta: (out, in) or (out,), or factors B (out, r) and A (r, in).
    """
    if isinstance(delta, tuple):
        b, a = (factor.double() for factor in delta)
        return torch.linalg.svdvals(torch.linalg.qr(b, mode="r")[1] @ torch.linalg.qr(a.T, mode="r")[1].T), True
    if delta.ndim < 2:
        return torch.linalg.vector_norm(delta, dtype=torch.float64)[None], True
    wide = delta.flatten(1).double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    if len(wide) <= _EXACT:
        return torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt().flip(0), True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(wide, q=_LISTED, niter=4)[1], False


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, EUSIPCO 2007): r where r of them are equal.

    Args:
        values: singular values, none of them negative.
    """
    if not bool(values.sum() > 0):
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def _moved(part: str, index: Tensor, delta: Tensor | tuple[Tensor, Tensor], weight: Tensor | None) -> MovedPart:
    change = delta if isinstance(delta, Tensor) else delta[0] @ delta[1]
    moved, held = _norms(part, index, change), None if weight is None else _norms(part, index, weight)
    order = moved.argsort(descending=True, stable=True)[:_LISTED]
    return MovedPart(
        len(index),
        index[order].tolist(),
        moved[order].tolist(),
        None if held is None else (moved[order] / held[order].clamp(min=torch.finfo(held.dtype).tiny)).tolist(),
    )


def _norms(part: str, index: Tensor, weight: Tensor) -> Tensor:
    if part == "entry":
        return weight.flatten()[index].double().abs()
    lines: Any = weight[index] if part == "row" else weight[:, index].T
    return torch.linalg.vector_norm(lines, dim=1, dtype=torch.float64)
