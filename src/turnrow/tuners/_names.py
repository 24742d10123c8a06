"""Names of modules in a config: what cannot be such is refused when it is made, and what no target is called before a model is touched.

peft takes a text for a list of letters, meets a broken expression when it has begun, and passes over names that match nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from turnrow.errors import UserError, near_matches
from turnrow.tuners._walk import find_named

__all__ = ["check_expression", "check_named", "check_names"]

_NAMES_OR_EXPRESSION = ("target_modules", "exclude_modules")
_NAMES = ("target_parameters", "modules_to_save")


def check_names(config: Any) -> None:
    """Refuse what peft could not match with the names of modules and the numbers of layers.

    Args:
        config: of RoCoFT or RoAd; fields that it does not have are passed over.

    Raises:
        UserError: a field is of another type, or an expression cannot be read; names the field.
    """
    for field in _NAMES_OR_EXPRESSION:
        value = getattr(config, field, None)
        if isinstance(value, str):
            check_expression(value, f"{field} is")
        elif value is not None:
            _check_list(value, field, "a list of names, or one regular expression")
    for field in _NAMES:
        value = getattr(config, field, None)
        if value is not None:
            _check_list(value, field, f"a list of names{f', such as [{value!r}]' if isinstance(value, str) else ''}")
    _check_layers(getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None))


def check_expression(pattern: str, where: str) -> None:
    """Refuse what is no regular expression.

    Args:
        pattern: a regular expression, or a plain name, which is one too.
        where: how the error begins, such as ``"target_modules is"``.

    Raises:
        UserError: says what is wrong with it.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{where} {pattern!r}, which is no regular expression: {error}; put a backslash before a character that stands for itself"
        ) from None


def check_named(field: str, names: Collection[str], targets: Collection[str]) -> None:
    """Refuse names, whole or their last parts, that no target has.

    Args:
        field: of the config that holds the names, for messages.
        names: of modules, or of fused weights.
        targets: the whole names of those that are adapted.

    Raises:
        UserError: names all that match none, with near matches.
    """
    unknown = [name for name in names if not find_named(name, targets)]
    if unknown:
        ends = {end for target in targets for end in (target, target.rpartition(".")[2])}
        raise UserError(
            f"{field}: no target module is called {', '.join(f'{name!r}{near_matches(name, ends)}' for name in unknown)}"
        )


def _check_list(value: object, field: str, allowed: str) -> None:
    if not isinstance(value, (list, tuple, set)):
        raise UserError(f"{field} is {value!r}; it must be None or {allowed}")
    wrong = [name for name in value if not isinstance(name, str)]
    if wrong:
        raise UserError(f"{field} contains {wrong[0]!r}; names are texts, such as {str(wrong[0])!r}")


def _check_layers(numbers: Any, patterns: Any) -> None:
    listed = numbers if isinstance(numbers, (list, tuple, set)) else [] if numbers is None else [numbers]
    wrong = [number for number in listed if isinstance(number, bool) or not isinstance(number, int)]
    if wrong:
        raise UserError(
            f"layers_to_transform is {numbers!r}; it must be None, the number of a layer, or a list of numbers"
        )
    if patterns is not None and not isinstance(patterns, str):
        _check_list(patterns, "layers_pattern", "a name, or a list of names")
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        check_expression(pattern, "layers_pattern is")
