"""A part of what is numbered 0 .. n - 1, as a user names it: the part of every weight that an adapter may own.

============  ====================================================================================
``":50%"``    the first half; ``"50%:"`` the second. The two share no number and leave none out.
``"::2"``     every second number from 0, ``"1::2"`` the others: a slice, as Python writes it
``"8:16"``    eight numbers
``[0, 3, 4]``  these
============  ====================================================================================

A slice holds for any n, so one text serves all weights of a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from turnrow.errors import UserError

__all__ = ["Subspace", "check_subspace", "check_subspaces", "most_specific", "of_module", "subspace"]

Subspace = str | Sequence[int]

_SLICE = re.compile(r"(\d{0,9}|\d{1,3}(?:\.\d{1,6})?%):(\d{0,9}|\d{1,3}(?:\.\d{1,6})?%)(?::(\d{0,9}))?")


def check_subspace(part: object, where: str) -> None:
    """Refuse what names no part, whatever it is a part of.

    Args:
        part: a slice as text, or a list of numbers.
        where: how to call it in an error, such as ``"blocks"``.

    Raises:
        UserError: says what is wrong with it.
    """
    if isinstance(part, str):
        match = _SLICE.fullmatch(part.replace(" ", ""))
        if match is None:
            raise UserError(
                f"{where} is {part!r}; it must be a slice such as '::2', '1::2', ':50%' or '50%:', or a list of numbers"
            )
        if any(end.endswith("%") and Fraction(end[:-1]) > 100 for end in match.group(1, 2)):
            raise UserError(f"{where} is {part!r}; it goes beyond 100%")
        if match[3] and int(match[3]) == 0:
            raise UserError(f"{where} is {part!r}; its step must be 1 or more")
        return
    if not isinstance(part, (list, tuple)) or not part:
        raise UserError(f"{where} is {part!r}; it must be a slice such as '::2' or ':50%', or a list of numbers")
    wrong = [number for number in part if isinstance(number, bool) or not isinstance(number, int) or number < 0]
    if wrong:
        raise UserError(f"{where} contains {wrong[0]!r}; its numbers are whole and not negative")
    if len(set(part)) < len(part):
        twice = next(number for number in part if part.count(number) > 1)
        raise UserError(f"{where} names {twice} more than once")


def check_subspaces(parts: object, where: str) -> None:
    """As `check_subspace`, of a part, of a dict from module names to parts, or of None, which is all."""
    if isinstance(parts, dict):
        for module, part in parts.items():
            if not isinstance(module, str):
                raise UserError(f"{where} names {module!r}; names of modules are texts, such as {str(module)!r}")
            check_subspace(part, f"{where}[{module!r}]")
    elif parts is not None:
        check_subspace(parts, where)


def of_module(parts: Any, module: str) -> Any:
    """The part for a module, of what `check_subspaces` lets through; None is all."""
    return most_specific(parts, module) if isinstance(parts, dict) else parts


def subspace(part: Subspace, size: int, *, where: str, what: str) -> Tensor:
    """The numbers of a part of 0 .. size - 1, int64 on the CPU, ascending.

    Args:
        part: a slice as text, or a list of numbers.
        size: how many there are.
        where: how to call the part in an error, such as ``"blocks of module 'layer.0'"``.
        what: what is numbered, in the plural, such as ``"rows"``.

    Raises:
        UserError: as `check_subspace`; a number that is not there, or none at all.
    """
    check_subspace(part, where)
    if not isinstance(part, str):
        if max(part) >= size:
            raise UserError(
                f"{where} contains {max(part)}, which is out of range: there are {size} {what}, numbered 0 to {size - 1}"
            )
        return torch.tensor(sorted(part), dtype=torch.int64)
    start, stop, step = (*part.replace(" ", "").split(":"), "")[:3]
    numbers = range(size)[slice(_end(start, size), _end(stop, size), int(step) if step else None)]
    if not numbers:
        raise UserError(f"{where} is {part!r}, which holds none of the {size} {what}, numbered 0 to {size - 1}")
    return torch.arange(numbers.start, numbers.stop, numbers.step)


def most_specific(entries: Mapping[str, Any], module: str) -> Any:
    """The entry for a module by its name: under its whole name, or else the longest ending that has one; None if none has."""
    pieces = module.split(".")
    return next((entries[key] for i in range(len(pieces)) if (key := ".".join(pieces[i:])) in entries), None)


def _end(text: str, size: int) -> int | None:
    """One end of a slice; a share is rounded down, so that the end of one part is the beginning of the next."""
    if not text:
        return None
    return int(Fraction(text[:-1]) * size / 100) if text.endswith("%") else int(text)
