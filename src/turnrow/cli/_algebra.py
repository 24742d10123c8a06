"""What the commands that combine adapters share: their arguments, and what they print."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turnrow.adapters import Composition

__all__ = ["add_common_arguments", "common", "print_composition"]

_LISTED = 5


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the result goes and what it has of modules trained whole."""
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the result")
    saved = parser.add_mutually_exclusive_group()
    saved.add_argument(
        "--saved-modules-of",
        metavar="DIR",
        help="whose modules trained whole, such as a classifier, the result gets: the folder of one of the adapters",
    )
    saved.add_argument("--no-saved-modules", action="store_true", help="leave modules trained whole out")
    parser.add_argument(
        "--no-check-base", action="store_true", help="combine even adapters that were trained on different bases"
    )


def common(args: argparse.Namespace) -> dict[str, Any]:
    """The common arguments as those of the operations."""
    return {
        "saved_modules_of": False if args.no_saved_modules else args.saved_modules_of,
        "check_base": not args.no_check_base,
    }


def print_composition(composition: Composition) -> None:
    """Say what was written, and what more than one adapter changed."""
    kept = f", and {', '.join(composition.saved_modules)} whole" if composition.saved_modules else ""
    print(f"wrote {composition.path}: {composition.method} adapter of {composition.modules} modules{kept}")
    if not composition.overlaps:
        return
    print(f"changed by more than one of the adapters, in {len(composition.overlaps)} modules:")
    for name, overlap in list(composition.overlaps.items())[:_LISTED]:
        print(f"  {name}: {overlap}")
    if len(composition.overlaps) > _LISTED:
        print(f"  and {len(composition.overlaps) - _LISTED} more")
