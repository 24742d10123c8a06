"""turnrow subtract: the difference of two adapters."""

from __future__ import annotations

import argparse

from turnrow.cli._algebra import add_common_arguments, common, print_composition

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "subtract"
HELP = "Make the adapter that leads from one adapter to another: composed after the second it gives the first."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("adapter", metavar="DIR", help="the folder of the adapter to take from")
    parser.add_argument("other", metavar="OTHER", help="the folder of the adapter to take away")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Subtract and print what came of it."""
    from turnrow.adapters import subtract

    print_composition(subtract(args.adapter, args.other, args.out, **common(args)))
    return 0
