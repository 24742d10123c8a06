"""turnrow compose: one adapter that does what several do."""

from __future__ import annotations

import argparse

from turnrow.cli._algebra import add_common_arguments, common, print_composition

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "compose"
HELP = "Combine adapters of one method and base: RoCoFT adapters are added, RoAd adapters applied one after the other."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("adapters", metavar="DIR", nargs="+", help="the folders of two or more adapters, in order")
    parser.add_argument(
        "--weights",
        metavar="W",
        nargs="+",
        type=float,
        help="one an adapter: a factor (RoCoFT) or a power (RoAd); default: 1 each",
    )
    parser.add_argument(
        "--combination",
        default="linear",
        help="linear, mean, magnitude_prune, ties, dare_linear or dare_ties; default: %(default)s",
    )
    parser.add_argument(
        "--density", type=float, help="share of its own values that each adapter keeps, where the combination thins out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the values that dare_* keeps; default: %(default)s")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Combine and print what came of it."""
    from turnrow.adapters import compose

    print_composition(
        compose(
            args.adapters,
            args.out,
            weights=args.weights,
            combination=args.combination,
            density=args.density,
            seed=args.seed,
            **common(args),
        )
    )
    return 0
