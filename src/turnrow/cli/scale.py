"""turnrow scale: an adapter that does more, less, or the opposite."""

from __future__ import annotations

import argparse

from turnrow.cli._algebra import print_composition

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "scale"
HELP = "Multiply what an adapter does by a factor; -1 makes the adapter that undoes it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("adapter", metavar="DIR", help="the adapter's folder")
    parser.add_argument(
        "--by",
        metavar="FACTOR",
        type=float,
        required=True,
        help="of the change (RoCoFT), or of the angles and as a power of the scales (RoAd)",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the result")


def run(args: argparse.Namespace) -> int:
    """Scale and print what came of it."""
    from turnrow.adapters import scale

    print_composition(scale(args.adapter, args.by, args.out))
    return 0
