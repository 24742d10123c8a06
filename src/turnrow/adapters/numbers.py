"""Is this value the kind of number that is asked for? ``True`` is none, though Python counts with it."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

__all__ = ["is_count", "is_number"]


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
