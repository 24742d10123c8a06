"""What the scores of rows, columns and entries are made of, gathered in one pass over calibration data.

An accumulator has a fixed size, however much data it is given: r numbers a dimension, or one number a weight where single
entries are to be chosen.

Letters: W (out, in) weight of a linear layer; X (tokens, in) its inputs, every row a token; dY (tokens, out) the gradient
of the loss of one batch with respect to its outputs; G = dY^T X (out, in), the gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from turnrow.selection.strategies import Part

__all__ = ["ExpertInputNorms", "GradientSums", "InputNorms", "real_tokens", "weight_gradient"]


class InputNorms:
    """||X_j||_2 of every input feature j, over all tokens: the data in Wanda's score.

    S_ij = ``|W_ij| ||X_j||_2`` (Sun et al., 2023, arXiv:2306.11695). The score of a row or a column is the sum of S over it,
    as in figure 3 of the RoCoFT paper. The norm runs over all tokens of all batches alike, so it does not depend on how the
    data were cut into batches.
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        self.count = 0
        """How many tokens were added."""

    def add(self, x: Tensor) -> None:
        """Add the inputs of some tokens, (tokens, in), of any floating-point dtype."""
        squares = _widened(x).square().sum(0, dtype=_sum_dtype(x))
        self._squares = squares if self._squares is None else self._squares.add_(squares)
        self.count += len(x)

    def scores(self, part: Part | str, weight: Tensor) -> Tensor:
        """The scores of the rows (out,), the columns (in,), or the entries (out * in,), row by row, of a weight (out, in)."""
        magnitudes = _widened(weight).abs()
        norms = magnitudes.new_zeros(weight.shape[1]) if self._squares is None else self._squares.sqrt().to(magnitudes)
        if part == "row":
            return magnitudes @ norms
        if part == "column":
            return magnitudes.sum(0) * norms
        return (magnitudes * norms).flatten()


class ExpertInputNorms:
    """`InputNorms` of each expert, over the tokens that went to it.

    Args:
        experts: how many there are.
    """

    def __init__(self, experts: int) -> None:
        self.of_each = tuple(InputNorms() for _ in range(experts))

    @property
    def count(self) -> int:
        """How many tokens were added, one that went to two experts twice."""
        return sum(norms.count for norms in self.of_each)

    def scores(self, part: Part | str, weight: Tensor) -> Tensor:
        """As those of `InputNorms`, with a leading dimension for the experts, of a weight (E, out, in)."""
        return torch.stack([norms.scores(part, own) for norms, own in zip(self.of_each, weight, strict=True)])


class GradientSums:
    """Sums of ``|G|`` or of G^2 over rows and columns, or entry by entry; every batch adds its own.

    ``|G|`` is the first-order effect of a change on the loss of a batch; G^2 of batches of one sample is the diagonal of the
    empirical Fisher information. Larger batches square their mean gradient, which costs less and sees less.

    Args:
        parts: which sums to keep: any of "row", "column", "entry".
        squared: sum G^2 instead of ``|G|``.
    """

    def __init__(self, parts: Collection[Part | str], *, squared: bool) -> None:
        self._parts = tuple(parts)
        self._squared = squared
        self._sums: dict[str, Tensor] = {}
        self.count = 0
        """How many batches were added."""

    def add(self, gradient: Tensor) -> None:
        """Add G of one batch, (..., out, in); it is overwritten."""
        magnitudes = gradient.square_() if self._squared else gradient.abs_()
        for part in self._parts:
            if part == "entry":
                new = magnitudes.flatten(-2)
            else:
                new = magnitudes.sum(-1 if part == "row" else -2, dtype=_sum_dtype(magnitudes))
            self._sums[part] = self._sums[part].add_(new) if part in self._sums else new
        self.count += 1

    def scores(self, part: Part | str) -> Tensor:
        """The scores of the rows (..., out), the columns (..., in), or the entries (..., out * in), row by row; needs a batch at least."""
        return self._sums[part]


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """G = dY^T X, (out, in), at least float32, from x (..., in) and dy (..., out) of the same tokens."""
    with torch.autocast(dy.device.type, enabled=False):
        return _widened(dy.reshape(-1, dy.shape[-1])).t() @ _widened(x.reshape(-1, x.shape[-1]))


def real_tokens(x: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """The tokens of x (..., in) as (tokens, in), without padding where a mask says which tokens are padding.

    Args:
        x: inputs of a linear layer.
        masks: attention masks (batch, length), not 0 where a token is real. The first that fits is taken: one of the
            shape of the tokens of x, (batch, length, in), or of as many tokens, (batch * length, in). Where none fits all
            tokens count: a pooled vector, a patch of an image, or what a router picked for an expert.
    """
    tokens = x.reshape(-1, x.shape[-1])
    for mask in masks:
        if mask.shape == x.shape[:-1] or (x.dim() == 2 and len(x) == mask.numel()):
            return tokens[mask.flatten().to(x.device) != 0]
    return tokens


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Of the long sums: float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
