"""The command ``turnrow``. It stands outside the package, whose import takes seconds, so that Ctrl-C is answered from the beginning."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

__all__ = ["main"]

# Optional packages that peft and transformers import where they are installed. What they have no kernel for on this machine they
# do without, and would say so, several lines of it, before the output of every command.
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")


def main() -> int:
    """Run one command; see `turnrow.cli.main.main`."""
    try:
        with _quietly():
            from turnrow.cli.main import main as run
        return run()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
