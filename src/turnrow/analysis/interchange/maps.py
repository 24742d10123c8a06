"""R, the map into whose coordinates hidden states are brought before parts of them are exchanged.

Letters: h (..., d) a hidden state; R (d, d) invertible; z = R h its coordinates, one a row of R.

- `Identity`: z = h; the coordinates are the features themselves.
- `Dense`: any invertible matrix.
- `Orthogonal`: a rotation of all features that can be trained: R^-1 = R^T whatever its parameters are (torch's
  parametrization). d (d - 1) / 2 degrees of freedom.
- `BlockRotation`: RoAd's R, blocks of 2 x 2, which turn and scale pairs: O(d) in parameters and time. R^-1 is that of
  the blocks, which is R^T only where all scales are 1.

A part of R is a set of its rows. Of a `BlockRotation` it can be a set of pairs, see `BlockRotation.rows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from turnrow.errors import UserError, near_matches
from turnrow.ops import pairs
from turnrow.ops.subspace import Subspace, subspace

__all__ = ["BlockRotation", "Dense", "Identity", "Map", "Orthogonal"]


class Map(nn.Module, ABC):
    """An invertible linear map of states of `size` features."""

    size: int

    @abstractmethod
    def into(self, h: Tensor) -> Tensor:
        """R h of states (..., d), in the dtype of h."""

    @abstractmethod
    def back(self, z: Tensor) -> Tensor:
        """R^-1 z of coordinates (..., d), in the dtype of z."""

    def forward(self, h: Tensor) -> Tensor:
        """R h."""
        return self.into(h)

    def inverse(self) -> Map:
        """R^-1 as a map, with the same parameters."""
        return _Inverse(self)


class _Inverse(Map):
    def __init__(self, of: Map) -> None:
        super().__init__()
        self.size, self.of = of.size, of

    def into(self, h: Tensor) -> Tensor:
        return self.of.back(h)

    def back(self, z: Tensor) -> Tensor:
        return self.of.into(z)


class Identity(Map):
    """R = I."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def into(self, h: Tensor) -> Tensor:
        """The states as they are."""
        return h

    def back(self, z: Tensor) -> Tensor:
        """The coordinates as they are."""
        return z


class Dense(Map):
    """R is a given matrix.

    Args:
        matrix: (d, d), invertible.

    Raises:
        UserError: it is not square, or singular to the digits of its dtype.
    """

    matrix: Tensor
    undo: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise UserError(f"the map is {list(matrix.shape)}; it must be square, (features, features)")
        values = torch.linalg.svdvals(matrix.detach().double())
        if not values[-1] > values[0] * torch.finfo(matrix.dtype).eps * len(matrix):
            raise UserError(f"the map is singular (singular values from {values[0]:.3g} to {values[-1]:.3g})")
        self.size = len(matrix)
        self.register_buffer("matrix", matrix.detach().clone())
        self.register_buffer("undo", torch.linalg.inv(matrix.detach().double()).to(matrix.dtype))

    def into(self, h: Tensor) -> Tensor:
        """R h."""
        return h @ self.matrix.to(h).T

    def back(self, z: Tensor) -> Tensor:
        """R^-1 z."""
        return z @ self.undo.to(z).T


class Orthogonal(Map):
    """R is a rotation that can be trained; at first a random one.

    Args:
        size: d.
        seed: of the first rotation; None starts at the identity.
        dtype: of its parameters.
    """

    def __init__(self, size: int, seed: int | None = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size = size
        start = torch.eye(size, dtype=dtype)
        if seed is not None:
            random = torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
            q, r = torch.linalg.qr(random)
            start = q * r.diagonal().sign()
        # The parametrization turns what it is given at first, which may be any orthogonal matrix.
        self.rotation = nn.utils.parametrizations.orthogonal(nn.Linear(size, size, bias=False, dtype=dtype))
        with torch.no_grad():
            self.rotation.weight = start

    @property
    def matrix(self) -> Tensor:
        """R, (d, d)."""
        weight: Any = self.rotation.weight
        return weight

    def into(self, h: Tensor) -> Tensor:
        """R h."""
        return h @ self.matrix.to(h).T

    def back(self, z: Tensor) -> Tensor:
        """R^T z."""
        return z @ self.matrix.to(z)


class BlockRotation(Map):
    """RoAd's R: theta and alpha as in an adapter's file; they can be trained.

    Args:
        theta: angles in rad, see `turnrow.ops.pairs.coefficients` for their order.
        alpha: scales, of the same shape.
        variant: ``road_1``, ``road_2`` or ``road_4``.
        group_size: which features form a pair; 2 pairs neighbours.

    Raises:
        UserError: the variant is unknown, the sizes do not fit, or a block cannot be undone.
    """

    def __init__(self, theta: Tensor, alpha: Tensor, *, variant: pairs.Variant = "road_1", group_size: int = 2) -> None:
        super().__init__()
        if variant not in get_args(pairs.Variant):
            allowed = get_args(pairs.Variant)
            raise UserError(
                f"variant is {variant!r}; it must be one of {', '.join(allowed)}{near_matches(str(variant), allowed)}"
            )
        each = pairs.parameter_size(variant, 2)
        if theta.shape != alpha.shape or theta.ndim != 1 or group_size < 2 or group_size % 2:
            raise UserError(
                f"theta is {list(theta.shape)}, alpha {list(alpha.shape)} and group_size {group_size!r}: the first two must be of one "
                "length, the last an even number"
            )
        if len(theta) % each or (2 * len(theta) // each) % group_size:
            raise UserError(f"{len(theta)} angles of {variant} make no whole groups of {group_size} features")
        self.variant, self.group_size = variant, group_size
        self.size = 2 * len(theta) // each
        self.theta, self.alpha = (nn.Parameter(values.detach().clone()) for values in (theta, alpha))
        if not pairs.is_invertible(self.blocks):
            raise UserError("a block of the rotation cannot be undone: a scale is 0, or its two rows are parallel")

    @classmethod
    def start(
        cls, size: int, *, variant: Literal["road_1", "road_2"] = "road_1", group_size: int = 2, spread: float = 0.0
    ) -> BlockRotation:
        """The identity, or angles drawn with a standard deviation of `spread` (rad) by torch's seed, scales 1."""
        n = pairs.parameter_size(variant, size)
        return cls(spread * torch.randn(n), torch.ones(n), variant=variant, group_size=group_size)

    @property
    def blocks(self) -> pairs.Blocks:
        """The 2 x 2 blocks."""
        return pairs.coefficients(self.variant, self.group_size, self.theta, self.alpha)

    def into(self, h: Tensor) -> Tensor:
        """R h."""
        return pairs.rotate(h, self.blocks)

    def back(self, z: Tensor) -> Tensor:
        """R^-1 z, by the inverse of each block."""
        return pairs.rotate(z, pairs.inverse(self.blocks))

    def rows(self, part: Subspace) -> list[int]:
        """The rows of R that belong to some pairs, numbered as RoAd's `blocks` are, such as ``":50%"``."""
        numbers = subspace(part, self.size // 2, where="the part", what="pairs")
        # Of road_2 there is one parameter a feature, so its places are those of the features.
        return pairs.places("road_2", self.group_size, numbers).tolist()
