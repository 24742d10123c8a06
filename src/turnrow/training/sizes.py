"""Numbers of bytes, as people read and write them."""

from __future__ import annotations

import re

from turnrow.errors import UserError

__all__ = ["parse_bytes", "readable_bytes"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def readable_bytes(value: float) -> str:
    """``1536`` as ``"1.5 KiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def parse_bytes(text: str) -> int:
    """``"24GB"`` as 24,000,000,000 and ``"24GiB"`` as 24 times 2^30.

    Raises:
        UserError: it is not a positive number followed by one of the units.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise UserError(f"memory is {text!r}; expected a size such as 24GB, 80GiB or 512MiB")
    return int(float(found[1]) * unit)
