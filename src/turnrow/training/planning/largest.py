"""The largest batch that fits, by few forecasts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

__all__ = ["LARGEST", "largest_batch"]

LARGEST = 65_536
"""Beyond this many rows the search stops."""

_PROBE = 64


def largest_batch(peak: Callable[[int], int], memory: int) -> int:
    """The largest batch whose forecast peak is at most `memory`, up to `LARGEST`; 0 if one row is too many.

    Args:
        peak: bytes for a batch size, asked once for each. It grows with the batch; for large batches, where activations
            outweigh all else, it is a straight line, which mostly gives the answer at the first guess.
        memory: bytes.
    """
    forecast = cache(peak)
    if forecast(1) > memory:
        return 0
    slope = max(1, (forecast(2 * _PROBE) - forecast(_PROBE)) // _PROBE)
    guess = _PROBE + (memory - forecast(_PROBE)) // slope
    fits, too_large, step = 1, LARGEST + 1, 1
    while too_large - fits > 1:
        guess = min(max(guess, fits + 1), too_large - 1)
        if forecast(guess) <= memory:
            fits, guess, step = guess, guess + step, 2 * step
        else:
            too_large, guess, step = guess, (fits + guess) // 2, 1
    return fits
