"""The errors for what a user gave: they name the thing, the value, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["AdapterError", "UserError", "near_matches"]


class UserError(ValueError):
    """Bad input by the user. The command line prints its text without a traceback and exits with status 2."""


class AdapterError(UserError):
    """An adapter on disk cannot be used: it is damaged, inconsistent, unsafe to read, or belongs to another base."""


def near_matches(name: str, allowed: Iterable[str], most: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the names of `allowed` closest to `name`, or ``""`` if none is near."""
    near = get_close_matches(name, list(allowed), n=most, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
