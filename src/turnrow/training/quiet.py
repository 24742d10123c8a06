"""Keep the libraries' own bars and messages off the terminal where they would only distract."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets

__all__ = ["without_cast_notes", "without_dataset_bars"]


@contextmanager
def without_dataset_bars(quiet: bool = True) -> Iterator[None]:
    """No bars of datasets while it encodes a split, if `quiet`; afterwards as before."""
    bars = datasets.is_progress_bar_enabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet and bars:
            datasets.enable_progress_bars()


def without_cast_notes() -> None:
    """From now on, no note of bitsandbytes at every forward of every int8 layer that its input is cast to float16."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_note)


def _is_no_cast_note(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg
