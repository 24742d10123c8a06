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
(`pairs.is_invertible`), h is kept instead.

Two ways to compute z, equal up to rounding:
- `rotate_output`: R on h, O(tokens * out). For few tokens, and for any base layer.
- `rotated_linear`: R on the rows of W, then one plain linear layer, O(in * out). For more tokens than `in`. The rotated
  weight lives only as long as the product; the backward pass makes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from turnrow.ops import pairs
from turnrow.ops.delta import without_autocast
from turnrow.ops.pairs import Blocks, Variant
from turnrow.ops.tokens import token_product

__all__ = [
    "Keep",
    "OutputWatch",
    "rotate_output",
    "rotate_weight_",
    "rotated_linear",
    "unrotate_weight_",
]

Keep = Literal["output", "copy", "input"]
"""What the backward pass keeps: z itself, a private copy of z, or h."""


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
        theta, alpha: parameters, see `pairs.coefficients`.
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

    Needs an invertible R (`pairs.is_invertible`); `keep` is "output" or "copy".

    Args:
        x: (..., in).
        weight: (out, in), frozen; may be a transposed view.
        bias: (out,) or None, frozen.

    Returns:
        z, (..., out), in the dtype of x.
    """
    return _RotatedLinear.apply(x, weight, bias, theta, alpha, _Settings(variant, group_size, keep, watch))


@torch.no_grad()
def rotate_weight_(weight: Tensor, bias: Tensor | None, blocks: Blocks) -> None:
    """W = R W and b = R b, in place and in at least float32 in between: merging. O(in * out), no out x out matrix."""
    weight.copy_(pairs.rotate_rows(weight, blocks))
    if bias is not None:
        bias.copy_(pairs.rotate_rows(bias.unsqueeze(1), blocks).squeeze(1))


def unrotate_weight_(weight: Tensor, bias: Tensor | None, blocks: Blocks) -> None:
    """W = R^-1 W and b = R^-1 b, in place: unmerging, by the closed-form inverse of the 2 x 2 blocks.

    Exact up to rounding; a merged weight that was rounded to bfloat16 has lost what no inverse brings back.
    """
    rotate_weight_(weight, bias, pairs.inverse(blocks))


@dataclass(frozen=True)
class _Settings:
    variant: Variant
    group_size: int
    keep: Keep
    watch: OutputWatch | None


class _RotateOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, alpha: Tensor, settings: _Settings) -> Tensor:
        blocks = pairs.coefficients(settings.variant, settings.group_size, theta, alpha)
        z = pairs.rotate_values(h, blocks)
        _save(ctx, z, h, (theta, alpha), settings)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        kept, theta, alpha = _saved(ctx)
        with without_autocast(dz):
            blocks = pairs.coefficients(ctx.settings.variant, ctx.settings.group_size, theta, alpha)
            dh = pairs.rotate_values(dz, pairs.transpose(blocks)) if ctx.needs_input_grad[0] else None
            d_theta, d_alpha = _parameter_gradients(ctx, kept, dz, theta, alpha, blocks)
        return dh, d_theta, d_alpha, None


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, alpha: Tensor, settings: _Settings
    ) -> Tensor:
        blocks = pairs.coefficients(settings.variant, settings.group_size, theta, alpha)
        rotated_bias = None if bias is None else pairs.rotate_rows(bias.unsqueeze(1), blocks).squeeze(1).to(x.dtype)
        z = linear(x, pairs.rotate_rows(weight, blocks).to(x.dtype), rotated_bias)
        _save(ctx, z, None, (theta, alpha, weight), settings)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, alpha, weight = _saved(ctx)
        with without_autocast(dz):
            blocks = pairs.coefficients(ctx.settings.variant, ctx.settings.group_size, theta, alpha)
            dx = dz @ pairs.rotate_rows(weight, blocks).to(dz.dtype) if ctx.needs_input_grad[0] else None
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
    ctx: Any, kept: Tensor, dz: Tensor, theta: Tensor, alpha: Tensor, blocks: Blocks, first_parameter: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """d theta and d alpha from the kept z (or h) and dz, see the top of the file."""
    if not (ctx.needs_input_grad[first_parameter] or ctx.needs_input_grad[first_parameter + 1]):
        return None, None
    variant, group_size = ctx.settings.variant, ctx.settings.group_size
    kept, dz = kept.reshape(-1, kept.shape[-1]), dz.reshape(-1, dz.shape[-1])
    if variant == "road_1" and ctx.settings.keep != "input":
        d_theta, d_alpha = _turning_gradients(kept, dz, blocks)
        return d_theta.view_as(theta).to(theta.dtype), (d_alpha.view_as(alpha) / alpha).to(alpha.dtype)
    k1, k2 = pairs.split(kept, blocks[0]).unbind(-2)  # (tokens, out / g, g / 2)
    d1, d2 = pairs.split(dz, blocks[0]).unbind(-2)
    sums = [_sum_products(d, k) for d in (d1, d2) for k in (k1, k2)]  # D11, D12, D21, D22 (or H, from h)
    h11, h12, h21, h22 = sums if ctx.settings.keep == "input" else _times_inverse_transposed(sums, blocks)
    # theta and alpha are short vectors: let autograd carry the four gradients through `pairs.coefficients`.
    with torch.enable_grad():
        leaves = theta.detach().requires_grad_(), alpha.detach().requires_grad_()
        outputs = pairs.coefficients(variant, group_size, *leaves)
        gradients = [g.to(theta.dtype) for g in (h11, -h12, h22, h21)]  # of c1, s1, c2, s2
        d_theta, d_alpha = torch.autograd.grad(outputs, leaves, gradients)
    return d_theta, d_alpha


def _turning_gradients(z: Tensor, dz: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """(D_21 - D_12, D_11 + D_22) of every pair: for complex pairs the imaginary and the real part of sum dz conj(z)."""
    wide = torch.promote_types(z.dtype, torch.float32)
    if pairs.are_neighbours(blocks, wide):
        z, dz = (values.to(wide).contiguous() for values in (z, dz))
        products = pairs.as_complex(dz) * pairs.as_complex(z).conj()
        d11_d22, d21_d12 = _sum_over_tokens(torch.view_as_real(products)).unbind(-1)
        return d21_d12, d11_d22
    z1, z2 = pairs.split(z, blocks[0]).unbind(-2)  # (tokens, out / g, g / 2)
    d1, d2 = pairs.split(dz, blocks[0]).unbind(-2)
    return _sum_products(d2, z1, d1, z2, sign=-1), _sum_products(d1, z1, d2, z2)


def _times_inverse_transposed(d: list[Tensor], blocks: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H = D R^-T for every pair."""
    d11, d12, d21, d22 = d
    c1, s1, c2, s2 = pairs.inverse(blocks)  # of R^-1 = [[c1, -s1], [s2, c2]]
    return d11 * c1 - d12 * s1, d11 * s2 + d12 * c2, d21 * c1 - d22 * s1, d21 * s2 + d22 * c2


def _sum_products(a: Tensor, b: Tensor, c: Tensor | None = None, d: Tensor | None = None, sign: int = 1) -> Tensor:
    """sum over tokens of a * b (+ sign * c * d), each (tokens, out / g, g / 2); in at least float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    product = torch.mul(a.to(wide), b.to(wide))
    if c is not None and d is not None:
        product.addcmul_(c.to(wide), d.to(wide), value=sign)
    return _sum_over_tokens(product)


def _sum_over_tokens(values: Tensor) -> Tensor:
    """Sum over the first dimension, by a product with a row of ones: on CPUs several times faster."""
    ones = values.new_ones(values.shape[0], 1)
    return token_product(ones, values.flatten(1)).view(values.shape[1:])
