"""R, the block-diagonal matrix of RoAd: its 2 x 2 blocks, and what they do to pairs of values.

The equations and letters are those of `rotation`, which adds the gradients. A block is [[c1, -s1], [s2, c2]]; the blocks of R
are kept as four tensors, one entry a pair.

Where both rows share their entries (road_1) a block turns and scales, and that is a product of complex numbers:
z1 + i z2 = (c + i s)(h1 + i h2). Neighbours in memory (g = 2) can be read as complex numbers as they lie, so there R is one
pass over the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "Blocks",
    "InPlace",
    "Shears",
    "Variant",
    "are_neighbours",
    "as_complex",
    "coefficients",
    "diagonal",
    "inverse",
    "is_invertible",
    "off_diagonal",
    "parameter_size",
    "parameters",
    "places",
    "polar",
    "prepare",
    "product",
    "rotate",
    "rotate_",
    "rotate_rows",
    "rotate_values",
    "split",
    "spread",
    "transpose",
]

Variant = Literal["road_1", "road_2", "road_4"]

Blocks = tuple[Tensor, Tensor, Tensor, Tensor]
"""(c1, s1, c2, s2), each (..., out / g, g / 2), one entry a pair. Where c1 is c2 and s1 is s2, the same tensors, R turns and scales."""

_SMALLEST_SCALE = 1e-6
_SMALLEST_DETERMINANT = 1e-3
_STEEPEST_SHEAR = 2.0
"""Up to this slope shears lose at most two bits against the plain product."""


def parameter_size(variant: Variant, out_features: int) -> int:
    """Length of theta, and of alpha."""
    sizes = {"road_1": out_features // 2, "road_2": out_features, "road_4": 2 * out_features}
    if variant not in sizes:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(get_args(Variant))}")
    return sizes[variant]


def places(variant: Variant, group_size: int, blocks: Tensor) -> Tensor:
    """Where theta, and alpha, hold what belongs to some of the blocks of R.

    Args:
        blocks: (n,) int64, numbers of blocks: block k turns the (k mod g / 2)-th pair of group k // (g / 2).

    Returns:
        (n,), (2 n,) or (4 n,) int64, ascending.
    """
    half = group_size // 2
    each = parameter_size(variant, 2)
    group, pair = blocks // half, blocks % half
    member = torch.arange(each, device=blocks.device)
    return ((group * each)[:, None] * half + member * half + pair[:, None]).flatten().sort().values


def spread(values: Tensor, at: Tensor | None, size: int, rest: float) -> Tensor:
    """(size,) with the values at the places `at` and `rest` elsewhere, differentiable in the values; None places all of them."""
    if at is None:
        return values
    return values.new_full((size,), rest).index_copy(0, at, values)


def coefficients(variant: Variant, group_size: int, theta: Tensor, alpha: Tensor) -> Blocks:
    """The entries of the blocks of R, differentiable in theta (rad) and alpha.

    Args:
        theta, alpha: (out / 2,), (out,) or (2 out,) for road_1, road_2 and road_4.

    Returns:
        (c1, s1, c2, s2), each (out / g, g / 2).
    """
    half = group_size // 2
    if variant == "road_1":
        c, s = _cosine_sine(theta.view(-1, half), alpha.view(-1, half))
        return c, s, c, s
    if variant == "road_2":
        c, s = _cosine_sine(theta.view(-1, 2, half), alpha.view(-1, 2, half))
        return c[:, 0], s[:, 0], c[:, 1], s[:, 1]
    # road_4: in every group the parameters of the g cosines come before those of the g sines.
    theta, alpha = theta.view(-1, 2, 2, half), alpha.view(-1, 2, 2, half)
    c, s = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
    return c[:, 0], s[:, 0], c[:, 1], s[:, 1]


def _cosine_sine(theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    return alpha * theta.cos(), alpha * theta.sin()


def is_invertible(blocks: Blocks) -> bool:
    """Whether every block of R can be undone without losing more than about three of float32's seven digits.

    Reads one number back from the device: call it when the parameters changed, not at every forward. Tensors without
    values (FakeTensor, meta) count as invertible, as a new adapter is.
    """
    c1, s1, c2, s2 = blocks
    if not _has_values(c1):
        return True
    determinant = c1 * c2 + s1 * s2
    size = c1 * c1 + s1 * s1 + c2 * c2 + s2 * s2
    good = (determinant.abs() >= _SMALLEST_DETERMINANT * size) & (size >= _SMALLEST_SCALE**2)
    return bool(good.all())  # NaN compares as false: a broken adapter counts as not invertible


def rotate(h: Tensor, blocks: Blocks) -> Tensor:
    """z = R h as plain differentiable operations: the reference, for transforms and higher derivatives.

    Args:
        h: (..., out).

    Returns:
        (..., out) in the dtype of h; computed in the wider dtype of h and the blocks.
    """
    c1, s1, c2, s2 = blocks
    h1, h2 = split(h, c1).unbind(-2)
    z = torch.stack((c1 * h1 - s1 * h2, s2 * h1 + c2 * h2), dim=-2)
    return z.reshape(h.shape).to(h.dtype)


def rotate_values(h: Tensor, blocks: Blocks) -> Tensor:
    """z = R h without a gradient: what `rotate` computes, with fewer passes over memory.

    Args:
        h: (..., out).

    Returns:
        (..., out) in the dtype of h; computed in the wider dtype of h and the blocks.
    """
    wide = _widen(h.contiguous(), blocks)
    z = torch.empty_like(wide)  # a tensor of its own, not a view of one: its reader may overwrite it
    if are_neighbours(blocks, wide.dtype):
        torch.mul(as_complex(wide), _turn(blocks), out=as_complex(z))
    else:
        _rotate_pairs(split(wide, blocks[0]), blocks, dim=-2, out=split(z, blocks[0]))
    return z.to(h.dtype)


def rotate_rows(weight: Tensor, blocks: Blocks) -> Tensor:
    """R W for W (out, in), a new tensor in the wider dtype of W and the blocks."""
    groups, half = blocks[0].shape
    wide = _widen(weight.contiguous(), blocks)
    rotated = torch.empty_like(wide)
    rows = (groups, 2, half, wide.shape[1])  # whole rows are contiguous: fast for any group size
    c1, s1, c2, s2 = (entry.unsqueeze(-1) for entry in blocks)
    _rotate_pairs(wide.view(rows), (c1, s1, c2, s2), dim=1, out=rotated.view(rows))
    return rotated


@dataclass(frozen=True, eq=False)
class Shears:
    """R as two shears and a scale, [[d1, 0], [0, d2]] [[1, 0], [b, 1]] [[1, a], [0, 1]]: three passes, each in place."""

    a: Tensor
    """Like an entry of the blocks: h1 += a h2."""
    b: Tensor
    """Like an entry of the blocks: h2 += b h1."""
    d: Tensor
    """(..., out): h *= d."""


InPlace = Tensor | Shears | Blocks
"""What `rotate_` takes: complex numbers, one a pair, of neighbours; shears; or the blocks as they are."""


def prepare(blocks: Blocks) -> InPlace:
    """The form of R in which `rotate_` takes the fewest passes; for values that serve more than one forward.

    On a CPU it reads the blocks' values, once.
    """
    if are_neighbours(blocks, blocks[0].dtype):
        return _turn(blocks)
    c1, s1, c2, s2 = blocks
    if c1.device.type != "cpu" or not _has_values(c1) or torch.compiler.is_compiling():
        return blocks  # whether shears are safe would have to come back from the device
    d2 = c2 + s1 * s2 / c1
    a, b = -s1 / c1, s2 / d2
    steepest = torch.maximum(a.abs(), b.abs())
    if not bool((steepest <= _STEEPEST_SHEAR).all()):  # NaN counts as too steep: a scale of zero
        return blocks
    return Shears(a, b, torch.stack((c1, d2), dim=-2).flatten(-3))


def rotate_(h: Tensor, prepared: InPlace) -> Tensor:
    """z = R h, written over h where h is as wide as R. On a CPU the time goes into memory that is touched.

    Args:
        h: (..., out), contiguous.

    Returns:
        (..., out) in the dtype of h; computed in the wider dtype of h and the blocks.
    """
    if isinstance(prepared, Tensor):
        if (h.dtype, prepared.dtype) == (
            torch.float32,
            torch.complex64,
        ):  # the same, in fewer calls: decoding feels them
            h.view(torch.complex64).mul_(prepared)
            return h
        wide = h.to(torch.promote_types(h.dtype, prepared.real.dtype))
        as_complex(wide).mul_(prepared)
    elif isinstance(prepared, Shears):
        wide = h.to(torch.promote_types(h.dtype, prepared.d.dtype))
        h1, h2 = split(wide, prepared.a).unbind(-2)
        h1.addcmul_(h2, prepared.a)
        h2.addcmul_(h1, prepared.b)
        wide.mul_(prepared.d)
    else:
        c1, s1, c2, s2 = prepared
        wide = _widen(h, prepared)
        h1, h2 = split(wide, c1).unbind(-2)
        of_h1 = h1 * s2
        h1.mul_(c1).addcmul_(h2, s1, value=-1)
        h2.mul_(c2).add_(of_h1)
    return wide.to(h.dtype)


def transpose(blocks: Blocks) -> Blocks:
    """R^T, as blocks: [[c1, s2], [-s1, c2]]."""
    c1, s1, c2, s2 = blocks
    minus = -s1
    return c1, minus if s1 is s2 else -s2, c2, minus


def inverse(blocks: Blocks) -> Blocks:
    """R^-1, as blocks: 1 / det [[c2, s1], [-s2, c1]]."""
    c1, s1, c2, s2 = blocks
    determinant = c1 * c2 + s1 * s2
    return c2 / determinant, -s1 / determinant, c1 / determinant, -s2 / determinant


def product(second: Blocks, first: Blocks) -> Blocks:
    """R_second R_first of one pairing, as blocks: first one rotation, then the other."""
    c1, s1, c2, s2 = second
    p1, q1, p2, q2 = first
    return c1 * p1 - s1 * q2, c1 * q1 + s1 * p2, c2 * p2 - s2 * q1, s2 * p1 + c2 * q2


def parameters(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """(theta, alpha) of road_2, (out,) each, whose blocks are these: any 2 x 2 block has exactly one such form, but for signs."""
    c1, s1, c2, s2 = blocks
    c, s = torch.stack((c1, c2), dim=-2), torch.stack((s1, s2), dim=-2)
    return torch.atan2(s, c).flatten(), torch.hypot(c, s).flatten()


def polar(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """How far a block turns, and how much it scales along its two axes: its nearest rotation, and its singular values.

    Of road_1 these are theta and |alpha|, but for full turns (and half a turn where alpha is negative).

    Returns:
        (angle, larger, smaller), each (..., out / g, g / 2): angle in rad from -pi to pi. Of a block that reflects, `smaller` is negative.
    """
    c1, s1, c2, s2 = blocks
    # [[c1, -s1], [s2, c2]] is the sum of a scaled rotation and a scaled reflection, of lengths p and q.
    p, q = torch.hypot(c1 + c2, s1 + s2) / 2, torch.hypot(c1 - c2, s2 - s1) / 2
    return torch.atan2(s1 + s2, c1 + c2), p + q, p - q


def diagonal(blocks: Blocks) -> Tensor:
    """R_jj for every output feature j, (out,).

    It is all of R that another group size can hold: with g the feature j is paired with j + g / 2 or j - g / 2, so that pairings
    of two group sizes have no pair in common, and every entry beside the diagonal of one R is zero in the other. For the same reason
    diag(R) is the R of another group size that is nearest in the Frobenius norm.
    """
    c1, _, c2, _ = blocks
    return torch.stack((c1, c2), dim=-2).flatten(-3)


def off_diagonal(blocks: Blocks) -> Tensor:
    """The entry of R beside the diagonal in the row of every output feature, (out,)."""
    _, s1, _, s2 = blocks
    return torch.stack((-s1, s2), dim=-2).flatten(-3)


def split(features: Tensor, block_entry: Tensor) -> Tensor:
    """View (..., out) as (..., out / g, 2, g / 2): the two members of a pair lie along dimension -2."""
    groups, half = block_entry.shape[-2:]
    return features.view(*features.shape[:-1], groups, 2, half)


def are_neighbours(blocks: Blocks, dtype: torch.dtype) -> bool:
    """Whether values in `dtype` can be read as complex numbers, which R multiplies: g = 2, and R turns and scales."""
    c1, s1, c2, s2 = blocks
    return c1.shape[-1] == 1 and c1 is c2 and s1 is s2 and dtype in (torch.float32, torch.float64)


def _turn(blocks: Blocks) -> Tensor:
    """c + i s of neighbours, (..., out / 2)."""
    return torch.complex(blocks[0], blocks[1]).squeeze(-1)


def as_complex(features: Tensor) -> Tensor:
    """View (..., out) as (..., out / 2) complex numbers."""
    return torch.view_as_complex(features.view(*features.shape[:-1], -1, 2))


def _widen(values: Tensor, blocks: Blocks) -> Tensor:
    return values.to(torch.promote_types(values.dtype, blocks[0].dtype))


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _rotate_pairs(v: Tensor, blocks: Blocks, *, dim: int, out: Tensor) -> None:
    """out = R v, where dimension `dim` holds the two members of each pair; v is at least as wide as the blocks."""
    c1, s1, c2, s2 = blocks
    v1, v2 = v.select(dim, 0), v.select(dim, 1)
    z1, z2 = out.select(dim, 0), out.select(dim, 1)
    torch.mul(v1, c1, out=z1).addcmul_(v2, s1, value=-1)
    torch.mul(v2, c2, out=z2).addcmul_(v1, s2)
