"""Combine adapters in folders to an adapter in a new folder: sums, differences, multiples, and what lies between two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.algebra.agreement import check_agreement, mean_of_saved_modules, saved_modules_of
from turnrow.adapters.algebra.combination import Combination, check_combination
from turnrow.adapters.algebra.result import Composition, PathLike, Saved, write_result, write_road
from turnrow.adapters.algebra.road import divide, interpolate_angles, multiply, rotations
from turnrow.adapters.algebra.rocoft import combine_rocoft
from turnrow.adapters.numbers import is_number
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.writing import check_new_folder
from turnrow.errors import UserError

__all__ = ["compose", "interpolate", "scale", "subtract"]


def compose(
    paths: Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float] | None = None,
    combination: str = "linear",
    density: float | None = None,
    seed: int = 0,
    saved_modules_of: PathLike | bool | None = None,
    check_base: bool = True,
) -> Composition:
    """One adapter that does what several do.

    RoCoFT adapters are added, and on rows and columns that only one of them has nothing is rounded: the result holds the same
    numbers. Where they meet, `combination` says how. RoAd adapters are applied one after the other, in the order given: angles add
    and scales multiply for road_1, matrices for the other variants; a weight is the power to which an adapter is taken.

    Args:
        paths: folders of two or more adapters, of one method and one base.
        out: a new or empty folder.
        weights: one an adapter; 1 each if None.
        combination: see `turnrow.adapters.algebra.combination.Kind`; RoAd takes ``linear`` and ``mean``.
        density: the share of its own values that each adapter keeps, for the combinations that thin out.
        seed: of the values that ``dare_linear`` and ``dare_ties`` keep.
        saved_modules_of: whose modules trained whole, such as a classifier, the result gets: the folder of one of the adapters;
            False for none. None takes those that the adapters agree on, and with ``mean`` their mean.
        check_base: refuse adapters of different bases.

    Raises:
        UserError: an argument is not allowed; the adapters cannot be combined (the first module that is in the way is named).
    """
    if isinstance(paths, (str, os.PathLike)) or len(paths) < 2:
        raise UserError(f"compose takes two or more adapters, got {paths!r}")
    checked = check_combination(combination, weights, density, len(paths))
    adapters = _read(paths, out, check_base=check_base)
    saved = _saved(adapters, paths, saved_modules_of, checked.weights if combination == "mean" else None)
    record = {
        "operation": "compose",
        "combination": combination,
        "weights": list(checked.weights),
        **({"density": density} if density is not None else {}),
        **({"seed": seed} if combination.startswith("dare") else {}),
    }
    if adapters[0].method == "ROAD":
        if combination not in ("linear", "mean"):
            raise UserError(
                f"combination is {combination!r}; RoAd adapters are multiplied: 'linear' or 'mean' can be said of them"
            )
        return write_road(adapters, out, record, saved, multiply([rotations(a) for a in adapters], checked.weights))
    return _write_rocoft(adapters, out, record, saved, checked, seed)


def scale(path: PathLike, factor: float, out: PathLike) -> Composition:
    """An adapter that does `factor` times as much: -1 takes away what it does.

    Of RoCoFT the change is multiplied; of RoAd the angles are, and the scales are taken to that power (-1 gives the inverse).
    Modules trained whole stay as they are.

    Raises:
        UserError: `factor` is not finite; the adapter is of another method; a rotation cannot be undone.
    """
    _check_number("factor", factor)
    adapters = _read([path], out, check_base=False)
    record = {"operation": "scale", "factor": factor}
    saved = saved_modules_of(adapters, None)
    if adapters[0].method == "ROAD":
        return write_road(adapters, out, record, saved, multiply([rotations(adapters[0])], [factor]))
    return _write_rocoft(adapters, out, record, saved, Combination("linear", (float(factor),)), 0)


def subtract(
    path: PathLike,
    other: PathLike,
    out: PathLike,
    *,
    saved_modules_of: PathLike | bool | None = None,
    check_base: bool = True,
) -> Composition:
    """The adapter that leads from `other` to the one in `path`: composed after `other` it gives that one.

    Args:
        saved_modules_of: as in `compose`, but None takes those of `path`.

    Raises:
        UserError: as `compose`.
    """
    adapters = _read([path, other], out, check_base=check_base)
    choice = path if saved_modules_of is None and adapters[0].saved_modules else saved_modules_of
    saved = _saved(adapters, [path, other], choice, None)
    record = {"operation": "subtract"}
    if adapters[0].method == "ROAD":
        return write_road(adapters, out, record, saved, divide(rotations(adapters[0]), rotations(adapters[1])))
    return _write_rocoft(adapters, out, record, saved, Combination("linear", (1.0, -1.0)), 0)


def interpolate(
    path: PathLike,
    other: PathLike,
    t: float,
    out: PathLike,
    *,
    saved_modules_of: PathLike | bool | None = None,
    check_base: bool = True,
) -> Composition:
    """What lies between two adapters: the first at t = 0, the other at t = 1, and beyond them outside.

    Of RoCoFT (1 - t) times the one change plus t times the other; of RoAd linear in the angles and geometric in the scales.
    Modules that both trained whole, in equal shapes, are interpolated as well.

    Args:
        saved_modules_of: as in `compose`.

    Raises:
        UserError: as `compose`; `t` is not finite.
    """
    _check_number("t", t)
    adapters = _read([path, other], out, check_base=check_base)
    weights = (1.0 - t, float(t))
    saved = _saved(adapters, [path, other], saved_modules_of, weights)
    record = {"operation": "interpolate", "t": t}
    if adapters[0].method == "ROAD":
        between = interpolate_angles(rotations(adapters[0]), rotations(adapters[1]), t)
        return write_road(adapters, out, record, saved, between)
    return _write_rocoft(adapters, out, record, saved, Combination("linear", weights), 0)


def _read(paths: Sequence[PathLike], out: PathLike, *, check_base: bool) -> list[AdapterFile]:
    check_new_folder(out)
    adapters = [read_adapter(path) for path in paths]
    check_agreement(adapters, check_base=check_base)
    return adapters


def _saved(
    adapters: Sequence[AdapterFile],
    paths: Sequence[PathLike],
    choice: PathLike | bool | None,
    weights: Sequence[float] | None,
) -> Saved:
    """`choice` as a folder becomes the adapter in it; with weights None means the mean."""
    if choice is None and weights is not None:
        mean = mean_of_saved_modules(adapters, weights)
        if mean is not None:
            return mean
    if choice is None or isinstance(choice, bool):
        return saved_modules_of(adapters, choice)
    wanted = Path(choice).resolve()
    chosen = next((adapter for adapter in adapters if adapter.path.resolve() == wanted), None)
    if chosen is None:
        raise UserError(f"saved_modules_of is {str(choice)!r}; it must be one of {', '.join(map(str, paths))}")
    return saved_modules_of(adapters, chosen)


def _write_rocoft(
    adapters: Sequence[AdapterFile],
    out: PathLike,
    record: dict[str, Any],
    saved: Saved,
    combination: Combination,
    seed: int,
) -> Composition:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        combined = combine_rocoft(adapters, combination)
    write_result(adapters, out, combined.modules, combined.config, record, saved)
    return Composition(Path(out), "ROCOFT", len(combined.modules), combined.overlaps, sorted(saved[0]))


def _check_number(name: str, value: float) -> None:
    if not is_number(value):
        raise UserError(f"{name} is {value!r}; it must be a finite number")
