"""The command ``turnrow``. It stands outside the package, whose import takes seconds, so that Ctrl-C is answered from the beginning."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run one command; see `turnrow.cli.main.main`."""
    try:
        from turnrow.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
