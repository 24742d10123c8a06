"""turnrow regroup: a RoAd adapter for another pairing of the features."""

from __future__ import annotations

import argparse

from turnrow.cli.console import table_console

__all__ = ["HELP", "NAME", "add_arguments", "run"]

# Not `pair`: beside `compose` that reads as making a pair of two adapters. What changes is peft's `group_size`.
NAME = "regroup"
HELP = "Bring a RoAd adapter to another group_size: exactly where it only scales features, else the nearest."

_LISTED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("adapter", metavar="DIR", help="the adapter's folder")
    parser.add_argument(
        "--group-size",
        metavar="G",
        type=int,
        required=True,
        help="pair feature j with j + G/2 within each group of G features; 2 pairs neighbours, as the paper does",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the result")
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="where features are turned, leave the turns out, which no other group size can hold, and say how much that is",
    )


def run(args: argparse.Namespace) -> int:
    """Regroup and print what came of it and what is lost."""
    from rich.table import Table

    from turnrow.adapters import regroup

    regrouping = regroup(args.adapter, args.group_size, args.out, nearest=args.nearest)
    kept = f", and {', '.join(regrouping.saved_modules)} whole" if regrouping.saved_modules else ""
    effect = f"leaves out {regrouping.residual:.2%} of ||R - I|| (by Frobenius norm)"
    print(
        f"wrote {regrouping.path}: ROAD adapter ({regrouping.variant}, group_size {regrouping.group_size}) of "
        f"{len(regrouping.norms)} modules{kept}, which {effect if regrouping.residual else 'does the same as before'}"
    )
    losing = [name for name, (_, lost) in regrouping.norms.items() if lost]
    if losing:
        table = Table("module", "||R - I||", "left out", box=None, padding=(0, 1))
        for name in sorted(losing, key=lambda name: regrouping.norms[name][1], reverse=True)[:_LISTED]:
            norm, lost = regrouping.norms[name]
            table.add_row(name, f"{norm:.4g}", f"{lost:.4g} ({lost / norm:.1%})")
        table_console().print(table)
        if len(losing) > _LISTED:
            print(f"and {len(losing) - _LISTED} more modules")
    return 0
