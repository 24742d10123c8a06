"""turnrow interpolate: what lies between two adapters."""

from __future__ import annotations

import argparse

from turnrow.cli._algebra import add_common_arguments, common, print_composition

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "interpolate"
HELP = "Make the adapter between two: linear in the change (RoCoFT), or in the angles (RoAd)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("adapter", metavar="DIR", help="the folder of the adapter at 0")
    parser.add_argument("other", metavar="OTHER", help="the folder of the adapter at 1")
    parser.add_argument("--at", metavar="T", type=float, required=True, help="where between them: 0.5 is half-way")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Interpolate and print what came of it."""
    from turnrow.adapters import interpolate

    print_composition(interpolate(args.adapter, args.other, args.at, args.out, **common(args)))
    return 0
