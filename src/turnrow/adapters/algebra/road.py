"""RoAd adapters combined module by module: their rotations are multiplied, first adapter first.

Rotations of one pairing form a group. Those of road_1 turn and scale each pair by one number each, so they commute: angles add and
scales multiply. Those of road_2 and road_4 are 2 x 2 matrices, whose product is one again; road_2 can hold any of them, so
what is not all road_1 becomes road_2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.errors import UserError
from turnrow.ops import pairs

__all__ = ["Rotation", "divide", "interpolate_angles", "multiply", "of_one_variant", "road_adapter", "rotations"]


@dataclass(frozen=True)
class Rotation:
    """What an adapter does to the outputs of one module, in float64."""

    variant: pairs.Variant
    group_size: int
    theta: Tensor
    """In rad; `alpha` and it as `pairs.coefficients` takes them."""
    alpha: Tensor

    @property
    def blocks(self) -> pairs.Blocks:
        """The 2 x 2 blocks."""
        return pairs.coefficients(self.variant, self.group_size, self.theta, self.alpha)

    @classmethod
    def of_blocks(cls, blocks: pairs.Blocks, group_size: int) -> Rotation:
        """The road_2 with these blocks."""
        return cls("road_2", group_size, *pairs.parameters(blocks))

    def identity(self) -> Rotation:
        """The rotation that does nothing, of the same form."""
        return Rotation(self.variant, self.group_size, torch.zeros_like(self.theta), torch.ones_like(self.alpha))

    def after(self, first: Rotation) -> Rotation:
        """First `first`, then this one."""
        if self.variant == first.variant == "road_1":
            return Rotation("road_1", self.group_size, first.theta + self.theta, first.alpha * self.alpha)
        return Rotation.of_blocks(pairs.product(self.blocks, first.blocks), self.group_size)

    def inverse(self) -> Rotation:
        """What undoes this one.

        Raises:
            ZeroDivisionError: a block is singular.
        """
        if self.variant == "road_1":
            if not self.alpha.all():
                raise ZeroDivisionError("a scale is 0")
            return Rotation("road_1", self.group_size, -self.theta, 1 / self.alpha)
        c1, s1, c2, s2 = self.blocks
        if not (c1 * c2 + s1 * s2).all():
            raise ZeroDivisionError("the determinant of a block is 0")
        return Rotation.of_blocks(pairs.inverse(self.blocks), self.group_size)

    def power(self, exponent: float) -> Rotation:
        """`exponent` times the angles and the scales to the `exponent`; -1 is the inverse.

        Of road_1 this is the power of R. Of road_2 and road_4, whose blocks are no mere rotations, it is so for 0, 1 and -1.

        Raises:
            ZeroDivisionError: as `inverse`.
        """
        if exponent < 0:
            return self.inverse().power(-exponent)
        return self if exponent == 1 else self.identity().towards(self, exponent)

    def towards(self, other: Rotation, t: float) -> Rotation:
        """The way from this one (t = 0) to `other` (t = 1): linear in the angles, geometric in the scales."""
        ours, others = (self, other) if self.variant == other.variant else (self._general(), other._general())
        theta, alpha = ours._with_scales_of_one_sign()
        other_theta, other_alpha = others._with_scales_of_one_sign()
        theta = (1 - t) * theta + t * other_theta
        return Rotation(ours.variant, ours.group_size, theta, alpha ** (1 - t) * other_alpha**t)

    def regrouped(self, group_size: int) -> Rotation:
        """What another pairing can hold of this one, the nearest in the Frobenius norm: its scales. See `pairs.diagonal`."""
        if group_size == self.group_size:
            return self
        scales = pairs.diagonal(self.blocks)
        return Rotation("road_2", group_size, torch.zeros_like(scales), scales)

    def smallest(self) -> Rotation:
        """The same rotation as road_1 where both features of every pair have one angle and one scale, else as road_2."""
        if self.variant == "road_1":
            return self
        general = self._general()
        theta, alpha = (t.view(-1, 2, self.group_size // 2) for t in (general.theta, general.alpha))
        if not (torch.equal(theta[:, 0], theta[:, 1]) and torch.equal(alpha[:, 0], alpha[:, 1])):
            return general
        return Rotation("road_1", self.group_size, theta[:, 0].flatten(), alpha[:, 0].flatten())

    def _general(self) -> Rotation:
        return self if self.variant == "road_2" else Rotation.of_blocks(self.blocks, self.group_size)

    def _with_scales_of_one_sign(self) -> tuple[Tensor, Tensor]:
        """Angles and scales of the same rotation without scales below zero."""
        return torch.where(self.alpha < 0, self.theta + math.pi, self.theta), self.alpha.abs()


def rotations(adapter: AdapterFile) -> dict[str, Rotation]:
    """What a RoAd adapter does, by module."""
    settings: Any = adapter.config
    return {
        name: Rotation(
            settings["variant"], settings["group_size"], tensors["road_theta"].double(), tensors["road_alpha"].double()
        )
        for name, tensors in adapter.modules.items()
    }


def road_adapter(
    combined: Mapping[str, Rotation], sources: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What the configuration says of rotations of one variant and pairing, and their tensors by module.

    Args:
        combined: by module.
        sources: tensors of which they were made: those of the result are as wide as the widest, and at least float32.
    """
    dtype = reduce(torch.promote_types, (t.dtype for tensors in sources for t in tensors.values()), torch.float32)
    modules = {
        name: {"road_theta": rotation.theta.to(dtype), "road_alpha": rotation.alpha.to(dtype)}
        for name, rotation in combined.items()
    }
    like = next(iter(combined.values()))
    return {"variant": like.variant, "group_size": like.group_size, "target_modules": sorted(combined)}, modules


def of_one_variant(combined: dict[str, Rotation]) -> dict[str, Rotation]:
    """The same rotations by module, all as road_2 where their variants differ: an adapter has one."""
    if len({rotation.variant for rotation in combined.values()}) == 1:
        return combined
    return {name: rotation._general() for name, rotation in combined.items()}


def multiply(factors: Sequence[dict[str, Rotation]], exponents: Sequence[float]) -> dict[str, Rotation]:
    """The rotations one after the other, each to its exponent; a module that only some have is left alone by the others."""
    return _by_module(
        factors,
        lambda own: reduce(
            lambda done, next_: next_.after(done),
            [rotation.power(exponent) for rotation, exponent in zip(own, exponents, strict=True)],
        ),
    )


def divide(whole: dict[str, Rotation], part: dict[str, Rotation]) -> dict[str, Rotation]:
    """What leads from `part` to `whole`: after `part` it gives `whole`."""
    return _by_module([whole, part], lambda own: own[0].after(own[1].inverse()))


def interpolate_angles(first: dict[str, Rotation], second: dict[str, Rotation], t: float) -> dict[str, Rotation]:
    """The way from one to the other, see `Rotation.towards`."""
    return _by_module([first, second], lambda own: own[0].towards(own[1], t))


def _by_module(
    factors: Sequence[dict[str, Rotation]], combine: Callable[[list[Rotation]], Rotation]
) -> dict[str, Rotation]:
    names = list(dict.fromkeys(name for factor in factors for name in factor))
    combined = {}
    for name in names:
        like = next(factor[name] for factor in factors if name in factor)
        own = [factor.get(name, like.identity()) for factor in factors]
        sizes = sorted({rotation.group_size for rotation in own})
        if len(sizes) > 1:
            raise UserError(
                f"module {name!r} is rotated in pairs of group_size {' and '.join(map(str, sizes))}: one adapter turns features together "
                "that the other turns with different ones, and their product pairs none. Merge one into the base and train or "
                "load the other on that (turnrow merge); or bring one to the other's pairs, where it only scales or its turns may be lost "
                "(turnrow regroup)"
            )
        try:
            combined[name] = combine(own)
        except ZeroDivisionError as error:
            raise UserError(f"the rotation of module {name!r} cannot be undone: {error}") from error
    return of_one_variant(combined)
