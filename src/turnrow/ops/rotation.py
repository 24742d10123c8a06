"""z = R h: rotate and scale pairs of output features.

RoAd (Liao et al., NeurIPS 2024, arXiv:2409.00119), equations 2 to 4. R is block-diagonal; the block of a pair (h1, h2) is

    z1 = c1 h1 - s1 h2      with  c = alpha cos(theta), s = alpha sin(theta)
    z2 = s2 h1 + c2 h2

- road_1: one (alpha, theta) a pair, so c1 = c2 and s1 = s2: a rotation times a scale; out / 2 of each parameter.
- road_2: one (alpha, theta) an output feature, so (c1, s1) and (c2, s2) are independent; out of each.
- road_4: cosine and sine have parameters of their own; 2 out of each.

Which features form a pair follows peft: within each group of `group_size` g neighbouring features, feature j is paired with
j + g/2. g = 2 pairs neighbours, as the paper does. The layout of theta and alpha is peft's too, so files go both ways.

Letters: W (out, in) weight; h, z (..., out) output of the linear layer before and after R; dz gradient of z; D the 2 x 2
matrix of sums over tokens D_ij = sum dz_i z_j of a pair.

What is kept for the backward pass. R can be undone, so the gradients of alpha and theta need only z and dz: with
H_ij = sum dz_i h_j = (D R^-T)_ij the gradients of the four block entries are dc1 = H_11, ds1 = -H_12, ds2 = H_21, dc2 = H_22.
For road_1 not even the inverse is needed: d alpha = (D_11 + D_22) / alpha and d theta = D_21 - D_12. z is the output of the
layer, which whatever reads it keeps in most cases anyway; h is not kept. Where a block cannot be undone safely
(`is_invertible`), h is kept instead.

Two ways to compute z, equal up to rounding:
- `rotate_output`: R on h, O(tokens * out). For few tokens, and for any base layer.
- `rotated_linear`: R on the rows of W, then one plain linear layer, O(in * out). For more tokens than `in`. The rotated
  weight lives only as long as the product; the backward pass makes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from turnrow.ops.delta import without_autocast
from turnrow.ops.tokens import token_product

__all__ = [
    "Keep",
    "OutputWatch",
    "Variant",
    "coefficients",
    "is_invertible",
    "parameter_size",
    "rotate",
    "rotate_output",
    "rotate_values",
    "rotate_weight_",
    "rotated_linear",
    "unrotate_weight_",
]

Variant = Literal["road_1", "road_2", "road_4"]

Keep = Literal["output", "copy", "input"]
"""What the backward pass keeps: z itself, a private copy of z, or h."""

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
"""(c1, s1, c2, s2), each (out / g, g / 2): the blocks, one entry a pair."""

_SMALLEST_SCALE = 1e-6
_SMALLEST_DETERMINANT = 1e-3


def parameter_size(variant: Variant, out_features: int) -> int:
    """Length of theta, and of alpha."""
    sizes = {"road_1": out_features // 2, "road_2": out_features, "road_4": 2 * out_features}
    if variant not in sizes:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(get_args(Variant))}")
    return sizes[variant]


def coefficients(variant: Variant, group_size: int, theta: Tensor, alpha: Tensor) -> Coefficients:
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


def is_invertible(blocks: Coefficients) -> bool:
    """Whether every block of R can be undone without losing more than about three of float32's seven digits.

    Reads one number back from the device: call it when the parameters changed, not at every forward. Tensors without
    values (FakeTensor, meta) count as invertible, as a new adapter is.
    """
    c1, s1, c2, s2 = blocks
    if isinstance(c1, FakeTensor) or c1.is_meta:
        return True
    determinant = c1 * c2 + s1 * s2
    size = c1 * c1 + s1 * s1 + c2 * c2 + s2 * s2
    good = (determinant.abs() >= _SMALLEST_DETERMINANT * size) & (size >= _SMALLEST_SCALE**2)
    return bool(good.all())  # NaN compares as false: a broken adapter counts as not invertible


def rotate(h: Tensor, blocks: Coefficients) -> Tensor:
    """z = R h as plain differentiable operations: the reference, for transforms and higher derivatives.

    Args:
        h: (..., out).

    Returns:
        (..., out) in the dtype of h; computed in the wider dtype of h and the blocks.
    """
    c1, s1, c2, s2 = blocks
    h1, h2 = _pairs(h, c1).unbind(-2)
    z = torch.stack((c1 * h1 - s1 * h2, s2 * h1 + c2 * h2), dim=-2)
    return z.reshape(h.shape).to(h.dtype)


def rotate_values(h: Tensor, blocks: Coefficients) -> Tensor:
    """z = R h without a gradient: what `rotate` computes, with fewer passes over memory.

    Args:
        h: (..., out).

    Returns:
        (..., out) in the dtype of h; computed in the wider dtype of h and the blocks.
    """
    wide = h.contiguous().to(torch.promote_types(h.dtype, blocks[0].dtype))
    z = torch.empty_like(wide)  # a tensor of its own, not a view of one: its reader may overwrite it
    _rotate_pairs(_pairs(wide, blocks[0]), blocks, dim=-2, out=_pairs(z, blocks[0]))
    return z.to(h.dtype)


@dataclass
class OutputWatch:
    """Whether the model overwrites the output of a layer in place (as `x += y` or an in-place activation does).

    z can only be kept for the backward pass where nobody overwrites it. `overwritten` is None until a backward pass has
    seen it; until then, and where it is True, a copy is kept.
    """

    overwritten: bool | None = None

    @property
    def keep(self) -> Keep:
        """What the next forward should keep."""
        return "output" if self.overwritten is False else "copy"


def rotate_output(
    h: Tensor,
    theta: Tensor,
    alpha: Tensor,
    *,
    variant: Variant,
    group_size: int,
    keep: Keep = "copy",
    watch: OutputWatch | None = None,
) -> Tensor:
    """z = R h for the output h of any base layer, O(tokens * out).

    Args:
        h: (..., out).
        theta, alpha: parameters, see `coefficients`.
        keep: what the backward pass keeps; "input" where R is not invertible.
        watch: told by the backward pass whether z was overwritten in the meantime.

    Returns:
        z, (..., out), in the dtype of h.
    """
    return _RotateOutput.apply(h, theta, alpha, _Settings(variant, group_size, keep, watch))


def rotated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    theta: Tensor,
    alpha: Tensor,
    *,
    variant: Variant,
    group_size: int,
    keep: Keep = "copy",
    watch: OutputWatch | None = None,
) -> Tensor:
    """z = R (W x + b) with R folded into W and b, O(in * out) beside the linear layer itself.

    Needs an invertible R (`is_invertible`); `keep` is "output" or "copy".

    Args:
        x: (..., in).
        weight: (out, in), frozen; may be a transposed view.
        bias: (out,) or None, frozen.

    Returns:
        z, (..., out), in the dtype of x.
    """
    return _RotatedLinear.apply(x, weight, bias, theta, alpha, _Settings(variant, group_size, keep, watch))


@torch.no_grad()
def rotate_weight_(weight: Tensor, bias: Tensor | None, blocks: Coefficients) -> None:
    """W = R W and b = R b, in place and in at least float32 in between: merging. O(in * out), no out x out matrix."""
    weight.copy_(_rotate_rows(weight, blocks))
    if bias is not None:
        bias.copy_(_rotate_rows(bias.unsqueeze(1), blocks).squeeze(1))


def unrotate_weight_(weight: Tensor, bias: Tensor | None, blocks: Coefficients) -> None:
    """W = R^-1 W and b = R^-1 b, in place: unmerging, by the closed-form inverse of the 2 x 2 blocks.

    Exact up to rounding; a merged weight that was rounded to bfloat16 has lost what no inverse brings back.
    """
    rotate_weight_(weight, bias, _inverse(blocks))


@dataclass(frozen=True)
class _Settings:
    variant: Variant
    group_size: int
    keep: Keep
    watch: OutputWatch | None


class _RotateOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, alpha: Tensor, settings: _Settings) -> Tensor:
        blocks = coefficients(settings.variant, settings.group_size, theta, alpha)
        z = rotate_values(h, blocks)
        _save(ctx, z, h, (theta, alpha), settings)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        kept, theta, alpha = _saved(ctx)
        with without_autocast(dz):
            blocks = coefficients(ctx.settings.variant, ctx.settings.group_size, theta, alpha)
            dh = rotate_values(dz, _transpose(blocks)) if ctx.needs_input_grad[0] else None
            d_theta, d_alpha = _parameter_gradients(ctx, kept, dz, theta, alpha, blocks)
        return dh, d_theta, d_alpha, None


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, alpha: Tensor, settings: _Settings
    ) -> Tensor:
        blocks = coefficients(settings.variant, settings.group_size, theta, alpha)
        rotated_bias = None if bias is None else _rotate_rows(bias.unsqueeze(1), blocks).squeeze(1).to(x.dtype)
        z = linear(x, _rotate_rows(weight, blocks).to(x.dtype), rotated_bias)
        _save(ctx, z, None, (theta, alpha, weight), settings)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, alpha, weight = _saved(ctx)
        with without_autocast(dz):
            blocks = coefficients(ctx.settings.variant, ctx.settings.group_size, theta, alpha)
            dx = dz @ _rotate_rows(weight, blocks).to(dz.dtype) if ctx.needs_input_grad[0] else None
            d_theta, d_alpha = _parameter_gradients(ctx, z, dz, theta, alpha, blocks, first_parameter=3)
        return dx, None, None, d_theta, d_alpha, None


def _save(ctx: Any, z: Tensor, h: Tensor | None, others: tuple[Tensor, ...], settings: _Settings) -> None:
    """Keep what the backward pass needs, by the choice in `settings.keep`."""
    ctx.settings = settings
    kept = h if settings.keep == "input" else z.clone() if settings.keep == "copy" else z
    ctx.save_for_backward(kept, *others)
    if settings.watch is not None and settings.keep == "copy":
        # A detached alias shares the version counter of z without keeping the graph alive.
        ctx.alias, ctx.version = z.detach(), z._version


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What `_save` kept; tells the watch whether z was overwritten."""
    watch = ctx.settings.watch
    if watch is not None and ctx.settings.keep == "copy":
        watch.overwritten = bool(watch.overwritten) or ctx.alias._version != ctx.version
    try:
        return ctx.saved_tensors
    except RuntimeError:
        if watch is not None and ctx.settings.keep == "output":
            # From the next forward on a copy is kept. This step is lost: its z is gone.
            watch.overwritten = True
        raise


def _parameter_gradients(
    ctx: Any, kept: Tensor, dz: Tensor, theta: Tensor, alpha: Tensor, blocks: Coefficients, first_parameter: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """d theta and d alpha from the kept z (or h) and dz, see the top of the file."""
    if not (ctx.needs_input_grad[first_parameter] or ctx.needs_input_grad[first_parameter + 1]):
        return None, None
    variant, group_size = ctx.settings.variant, ctx.settings.group_size
    k1, k2 = _pairs(kept.reshape(-1, kept.shape[-1]), blocks[0]).unbind(-2)  # (tokens, out / g, g / 2)
    d1, d2 = _pairs(dz.reshape(-1, dz.shape[-1]), blocks[0]).unbind(-2)
    if variant == "road_1" and ctx.settings.keep != "input":
        d_theta = _sum_tokens(d2, k1, d1, k2, sign=-1).view_as(theta)
        d_alpha = _sum_tokens(d1, k1, d2, k2).view_as(alpha) / alpha
        return d_theta.to(theta.dtype), d_alpha.to(alpha.dtype)
    sums = [_sum_tokens(d, k) for d in (d1, d2) for k in (k1, k2)]  # D11, D12, D21, D22 (or H, from h)
    h11, h12, h21, h22 = sums if ctx.settings.keep == "input" else _times_inverse_transposed(sums, blocks)
    # theta and alpha are short vectors: let autograd carry the four gradients through `coefficients`.
    with torch.enable_grad():
        leaves = theta.detach().requires_grad_(), alpha.detach().requires_grad_()
        outputs = coefficients(variant, group_size, *leaves)
        gradients = [g.to(theta.dtype) for g in (h11, -h12, h22, h21)]  # of c1, s1, c2, s2
        d_theta, d_alpha = torch.autograd.grad(outputs, leaves, gradients)
    return d_theta, d_alpha


def _pairs(features: Tensor, block_entry: Tensor) -> Tensor:
    """View (..., out) as (..., out / g, 2, g / 2): the two members of a pair lie along dimension -2."""
    groups, half = block_entry.shape[-2:]
    return features.view(*features.shape[:-1], groups, 2, half)


def _rotate_pairs(v: Tensor, blocks: Coefficients, *, dim: int, out: Tensor) -> None:
    """out = R v, where dimension `dim` holds the two members of each pair; v is at least as wide as the blocks."""
    c1, s1, c2, s2 = blocks
    v1, v2 = v.select(dim, 0), v.select(dim, 1)
    z1, z2 = out.select(dim, 0), out.select(dim, 1)
    torch.mul(v1, c1, out=z1).addcmul_(v2, s1, value=-1)
    torch.mul(v2, c2, out=z2).addcmul_(v1, s2)


def _rotate_rows(weight: Tensor, blocks: Coefficients) -> Tensor:
    """R on the rows of W (out, in): the new weight, in the wider dtype of W and the blocks."""
    groups, half = blocks[0].shape
    wide = weight.contiguous().to(torch.promote_types(weight.dtype, blocks[0].dtype))
    rotated = torch.empty_like(wide)
    rows = (groups, 2, half, wide.shape[1])  # whole rows are contiguous: fast for any group size
    c1, s1, c2, s2 = (entry.unsqueeze(-1) for entry in blocks)
    _rotate_pairs(wide.view(rows), (c1, s1, c2, s2), dim=1, out=rotated.view(rows))
    return rotated


def _transpose(blocks: Coefficients) -> Coefficients:
    """R^T, as blocks: [[c1, s2], [-s1, c2]]."""
    c1, s1, c2, s2 = blocks
    return c1, -s2, c2, -s1


def _inverse(blocks: Coefficients) -> Coefficients:
    """R^-1, as blocks: 1 / det [[c2, s1], [-s2, c1]]."""
    c1, s1, c2, s2 = blocks
    determinant = c1 * c2 + s1 * s2
    return c2 / determinant, -s1 / determinant, c1 / determinant, -s2 / determinant


def _times_inverse_transposed(d: list[Tensor], blocks: Coefficients) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H = D R^-T for every pair."""
    d11, d12, d21, d22 = d
    c1, s1, c2, s2 = _inverse(blocks)  # of R^-1 = [[c1, -s1], [s2, c2]]
    return d11 * c1 - d12 * s1, d11 * s2 + d12 * c2, d21 * c1 - d22 * s1, d21 * s2 + d22 * c2


def _sum_tokens(a: Tensor, b: Tensor, c: Tensor | None = None, d: Tensor | None = None, sign: int = 1) -> Tensor:
    """sum over tokens of a * b (+ sign * c * d), each (tokens, out / g, g / 2); in at least float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    product = torch.mul(a.to(wide), b.to(wide))
    if c is not None and d is not None:
        product.addcmul_(c.to(wide), d.to(wide), value=sign)
    # A product with a row of ones: on CPUs several times faster than a sum over the first dimension.
    ones = product.new_ones(product.shape[0], 1)
    return token_product(ones, product.flatten(1)).view(product.shape[1:])
