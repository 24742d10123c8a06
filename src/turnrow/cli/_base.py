"""Which base model a command takes: the one that is given, else the one that the adapter names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turnrow.adapters import AdapterFile

__all__ = ["base_of"]


def base_of(adapter: AdapterFile, given: str | None) -> str:
    """Where the base of `adapter` lies, a folder or a Hub id.

    Args:
        given: the argument ``--base``, if there was one.

    Raises:
        UserError: there was none, and the adapter does not say.
    """
    from turnrow.errors import UserError
    from turnrow.pretrained import resolve_model

    location = given or adapter.base_name
    if not location:
        raise UserError(f"{adapter.path} does not name its base model: give --base MODEL")
    return resolve_model(location)
