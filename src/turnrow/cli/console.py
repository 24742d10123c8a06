"""The console that tables are printed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FILE_WIDTH", "table_console"]

FILE_WIDTH = 240
"""Characters a line in a file or a pipe, where there is no edge of the screen to break lines at."""


def table_console() -> Console:
    """Standard output as wide as the screen, or `FILE_WIDTH` where it is none; text is printed as it is."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console
