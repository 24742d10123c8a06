"""The largest batch that fits, by as few forecasts as possible."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["LARGEST", "largest_batch"]

LARGEST = 65_536
"""Beyond this many rows the search stops."""


def largest_batch(peak: Callable[[int], int], memory: int) -> int:
    """The largest batch whose forecast peak is at most `memory`, up to `LARGEST`; 0 if one row is too many.

    Args:
        peak: bytes for a batch size, growing with it, nearly a straight line; asked at most once for each size.
        memory: bytes.
    """
    known: dict[int, int] = {}

    def forecast(batch: int) -> int:
        return known.setdefault(batch, known[batch] if batch in known else peak(batch))

    if forecast(1) > memory:
        return 0
    fits, too_large = 1, LARGEST + 1
    slope = max(1, forecast(2) - forecast(1))
    while too_large - fits > 1:
        guess = fits + max(1, (memory - forecast(fits)) // slope)
        guess = min(guess, too_large - 1)
        if forecast(guess) <= memory:
            fits = guess
        else:
            too_large = guess
            # Between two known sizes a straight line is close.
            slope = max(1, (forecast(too_large) - forecast(fits)) // (too_large - fits))
    return fits
