"""Keep the libraries' own bars and messages off the terminal where they would only distract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import transformers

__all__ = ["without_dataset_bars", "without_transformers_messages"]


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


@contextmanager
def without_transformers_messages() -> Iterator[None]:
    """No report of newly initialised weights, which here is the purpose, and no bar for loading or saving."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
