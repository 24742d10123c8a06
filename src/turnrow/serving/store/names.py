"""Names of adapters: what a client may ask for, and what a folder may be called."""

from __future__ import annotations

import os
import re
from pathlib import Path

from turnrow.errors import UserError

__all__ = ["BASE", "check_name", "folder_inside"]

BASE = "base"
"""The name by which requests ask for the base model, without an adapter."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: object) -> str:
    """Return `name` if an adapter may be called so.

    Raises:
        UserError: it is no text of 1 to 128 letters, digits, dots, dashes and underscores that begins with a letter or digit, or it
            is `BASE`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"the adapter's name is {name!r}; it must be 1 to 128 letters, digits, '.', '-' and '_', and begin with a letter or digit"
        )
    if name == BASE:
        raise UserError(f"no adapter can be called {BASE!r}, which names the base model")
    return name


def folder_inside(root: Path, name: str | os.PathLike[str]) -> Path:
    """The folder `name` in `root`.

    Raises:
        UserError: it would lie outside of `root`, also by way of a link, or is no path at all.
    """
    try:
        folder = (root / name).resolve()
        folder.exists()
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise UserError(
            f"{str(name)[:80]!r} is no path of a folder: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not folder.is_relative_to(root.resolve()) or folder == root.resolve():
        raise UserError(
            f"{str(name)!r} is no folder inside of the adapters' folder: adapters are loaded from there only"
        )
    return folder
