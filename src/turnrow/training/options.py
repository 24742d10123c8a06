"""Check what a user wrote in one section of a recipe against the dataclass that will receive it.

Names are compared with the dataclass' fields (an unknown one is an error with near matches), values are converted by the
field's type annotation with jsonargparse, so that the ``2e-3`` of YAML 1.1, a string there, becomes the float it means.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from turnrow.errors import UserError, near_matches

__all__ = ["check_names", "check_options"]


def check_names(values: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    """Raise UserError for the first key of `values` that is not in `allowed`, with the nearest allowed names."""
    for name in values:
        if name not in allowed:
            raise UserError(
                f"{where} has no field {name!r}{near_matches(str(name), allowed) or '; allowed: ' + ', '.join(allowed)}"
            )


def check_options(
    values: Mapping[str, Any], receiver: type, where: str, reserved: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return `values` converted to the types of the dataclass `receiver`.

    Args:
        values: what the user wrote, by field name.
        receiver: the dataclass that will be built from it.
        where: how to call this section in an error, such as ``"training"``.
        reserved: fields that are not the user's to set here, each with the reason.

    Raises:
        UserError: unknown name (with near matches), reserved name (with its reason) or a value of another type.
    """
    reserved = reserved or {}
    for name in values:
        if name in reserved:
            raise UserError(f"{where}.{name} cannot be set here: {reserved[name]}")
    check_names(values, [f.name for f in fields(receiver) if f.init and f.name not in reserved], where)
    hints = get_type_hints(receiver)
    return {name: _convert(value, hints[name], f"{where}.{name}") for name, value in values.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value})["value"]
    except ArgumentError as error:
        # One for every type that the field may have.
        kinds = re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", str(error), flags=re.MULTILINE)
        expected = re.sub(r"<class '(\w+)'>", r"\1", " or ".join(kinds)).replace("NoneType", "null") or str(hint)
        raise UserError(f"{where} is {value!r}; expected {expected}") from None
