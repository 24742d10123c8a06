"""Keep the libraries' own bars and messages off the terminal where they would only distract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import transformers

__all__ = ["without_dataset_bars", "without_load_report", "without_weight_bars"]


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
def without_weight_bars() -> Iterator[None]:
    """No bars of transformers while it loads or saves weights."""
    logging = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@contextmanager
def without_load_report() -> Iterator[None]:
    """No bars, and no report of newly initialised weights, which here is the purpose."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_weight_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)
