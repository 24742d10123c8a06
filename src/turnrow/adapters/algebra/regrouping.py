"""Bring a RoAd adapter to another pairing of the output features: exactly where it only scales, else as near as that comes.

peft pairs feature j with j + g / 2 within each group of g = `group_size` features. Pairings of two group sizes have no pair in
common, so what an adapter turns in the one the other cannot turn: of R its diagonal is left, see `turnrow.ops.pairs.diagonal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from turnrow.adapters.algebra.agreement import saved_modules_of
from turnrow.adapters.algebra.result import PathLike, write_road
from turnrow.adapters.algebra.road import Rotation, of_one_variant, rotations
from turnrow.adapters.checks import check_finite
from turnrow.adapters.numbers import is_count
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import check_new_folder
from turnrow.errors import UserError
from turnrow.ops import pairs

__all__ = ["Regrouping", "check_group_size", "regroup"]

_LISTED = 3
_ROUNDING = 2.0**-22
"""A turn by less than this, beside the scale, is none: the sine of float32's pi, for a scale below zero, is 2^-23.4."""


@dataclass(frozen=True)
class Regrouping:
    """What was written, and what of the turns is lost."""

    path: Path
    """The folder of the new adapter."""
    variant: pairs.Variant
    """The smallest that holds it."""
    group_size: int
    norms: dict[str, tuple[float, float]]
    """By module: Frobenius norms of R - I, and of what the new pairing leaves out of that."""
    saved_modules: list[str]
    """Parameters that it holds whole."""

    @property
    def residual(self) -> float:
        """What is left out of all modules together, over the norm of R - I; 0 is exact."""
        return _residual(self.norms)


@torch.no_grad()
def regroup(path: PathLike, group_size: int, out: PathLike, *, nearest: bool = False) -> Regrouping:
    """Write the RoAd adapter in `path` for another `group_size` into the folder `out`; 2 pairs neighbours, as the paper does.

    It does the same as before where no feature is turned, only scaled, which is checked to the rounding of float32. The result is
    road_1 where the features of every pair share one scale, else road_2.

    Args:
        path: the adapter's folder.
        group_size: an even number that divides the output features of all its modules.
        out: a new or empty folder.
        nearest: where features are turned, write what is nearest in the Frobenius norm, which keeps the diagonal of R.

    Raises:
        UserError: it is no RoAd adapter; `group_size` is not allowed, or does not divide the features of a module (named); features
            are turned and `nearest` is False (the modules that would lose most are named); `out` is not empty.
    """
    check_group_size(group_size)
    check_new_folder(out)
    adapter = read_adapter(path)
    if adapter.method != "ROAD":
        raise UserError(
            f"{adapter.path} is a {adapter.method} adapter: only ROAD adapters turn features in pairs and have a group_size"
        )
    check_finite(adapter)
    held = rotations(adapter)
    _check_divides(group_size, held)
    own = next(iter(held.values())).group_size
    norms = {name: _norms(rotation, group_size) for name, rotation in held.items()}
    if not nearest and not all(_is_held(rotation, group_size) for rotation in held.values()):
        raise UserError(
            f"{adapter.path} turns pairs of group_size {own}, and with group_size {group_size} no pair is the same: {_loss(norms)}. "
            "nearest=True (--nearest) writes what is left, the scales; merging it into the base loses nothing (turnrow merge)"
        )
    regrouped = of_one_variant({name: rotation.regrouped(group_size).smallest() for name, rotation in held.items()})
    saved = saved_modules_of([adapter], None)
    record = {"operation": "regroup", "from_group_size": own, "group_size": group_size, "residual": _residual(norms)}
    write_road([adapter], out, record, saved, regrouped)
    variant = next(iter(regrouped.values())).variant
    return Regrouping(Path(out), variant, group_size, norms, sorted(saved[0]))


def check_group_size(group_size: int) -> None:
    """Refuse what is no even number from 2 on (UserError)."""
    if not is_count(group_size) or group_size % 2:
        raise UserError(f"group_size is {group_size!r}; it must be an even number, 2 or more")


def _check_divides(group_size: int, held: Mapping[str, Rotation]) -> None:
    sizes = {name: 2 * rotation.blocks[0].numel() for name, rotation in held.items()}
    bad = [f"{name!r} ({size})" for name, size in sizes.items() if size % group_size]
    if bad:
        common = math.gcd(*sizes.values())
        raise UserError(
            f"group_size is {group_size}, which does not divide the output features of {_first(bad)}: for these modules it must be an "
            f"even number that divides {common}"
        )


def _norms(rotation: Rotation, group_size: int) -> tuple[float, float]:
    """Frobenius norms of R - I, and of what `group_size` leaves out of it."""
    turns = pairs.off_diagonal(rotation.blocks)
    scales = pairs.diagonal(rotation.blocks) - 1
    lost = 0.0 if group_size == rotation.group_size else torch.linalg.vector_norm(turns).item()
    return math.hypot(torch.linalg.vector_norm(scales).item(), torch.linalg.vector_norm(turns).item()), lost


def _is_held(rotation: Rotation, group_size: int) -> bool:
    """Whether the rotation does the same in pairs of `group_size`."""
    turns, scales = pairs.off_diagonal(rotation.blocks), pairs.diagonal(rotation.blocks)
    return group_size == rotation.group_size or bool((turns.abs() <= _ROUNDING * scales.abs()).all())


def _residual(norms: Mapping[str, tuple[float, float]]) -> float:
    whole = math.hypot(*(norm for norm, _ in norms.values()))
    return math.hypot(*(lost for _, lost in norms.values())) / whole if whole else 0.0


def _loss(norms: Mapping[str, tuple[float, float]]) -> str:
    losing = sorted((name for name in norms if norms[name][1]), key=lambda name: norms[name][1], reverse=True)
    listed = [f"{name!r} ({norms[name][1]:.4g} of {norms[name][0]:.4g})" for name in losing]
    return f"{_residual(norms):.1%} of ||R - I|| would be lost, most in {_first(listed)}"


def _first(named: list[str]) -> str:
    more = f" and {len(named) - _LISTED} more modules" if len(named) > _LISTED else ""
    return ", ".join(named[:_LISTED]) + more
