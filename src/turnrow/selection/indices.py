"""Checks on row and column numbers that a user gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from turnrow.errors import UserError

__all__ = ["check_form", "check_indices", "plural"]


def check_form(indices: object, where: str) -> None:
    """Refuse what cannot be indices, whatever modules and sizes they are for.

    Args:
        indices: a list of numbers, or of lists of them, one for each expert; or a dict from names of modules or parts to such lists
            or dicts.
        where: how to call them in an error, such as ``"indices"``.

    Raises:
        UserError: a value is neither list nor dict, a name is no text, or a list has numbers beside lists; names the place.
    """
    if isinstance(indices, dict):
        for name, own in indices.items():
            if not isinstance(name, str):
                raise UserError(f"{where} has the name {name!r}; names of modules are texts, such as {str(name)!r}")
            check_form(own, f"{where}[{name!r}]")
        return
    if not isinstance(indices, (list, tuple)):
        raise UserError(
            f"{where} is {indices!r}; it must be a list of numbers; a module that selection serves is left out"
        )
    single = [number for number in indices if not isinstance(number, (list, tuple))]
    if single and len(single) < len(indices):
        raise UserError(
            f"{where} has {single[0]!r} beside lists; it must be one list of numbers, or a list for each expert"
        )


def check_indices(indices: Sequence[int], size: int, *, what: str, module: str) -> Tensor:
    """Return `indices` as (r,) int64 in the order given.

    Args:
        indices: row or column numbers, each in 0 .. size - 1 and given once.
        size: number of rows or columns of the weight.
        what: "row", "column" or "entry", for messages.
        module: name of the module, for messages.

    Raises:
        UserError: there are none, one is no integer, out of range or given twice; names module and value.
    """
    if len(indices) == 0:
        raise UserError(f"indices of module {module!r} are empty: give at least one {what} number")
    wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int)]
    if wrong:
        raise UserError(f"indices of module {module!r} contain {wrong[0]!r}; {what} numbers are integers")
    outside = [i for i in indices if not 0 <= i < size]
    if outside:
        raise UserError(
            f"indices of module {module!r} contain {outside[0]}, which is out of range: it has {size} {plural(what)}, "
            f"numbered 0 to {size - 1}"
        )
    if len(set(indices)) < len(indices):
        twice = sorted(i for i, times in Counter(indices).items() if times > 1)
        raise UserError(f"indices of module {module!r} name {what} {twice[0]} more than once; give each {what} once")
    return torch.tensor(indices, dtype=torch.int64)


def plural(what: str) -> str:
    """Several of "row", "column" or "entry"."""
    return "entries" if what == "entry" else f"{what}s"
