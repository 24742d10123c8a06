"""``turnrow select``: choose what RoCoFT trains, into a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turnrow.cli.console import table_console
from turnrow.errors import UserError

if TYPE_CHECKING:
    from turnrow.selection import Selection

__all__ = ["HELP", "NAME", "TAKES_OVERRIDES", "add_arguments", "run"]

NAME = "select"
HELP = "choose the rows, columns or entries that RoCoFT trains, by a recipe's method.selection, into a file"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; any other ``--field value`` overrides the recipe."""
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the indices, as JSON")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="how many training rows to look at, the first in the order of training (default: the recipe's "
        "calibration_samples, 256)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.epilog = (
        "Train with them by method.indices:\n"
        "  turnrow select --config recipes/sst2.yaml --method.selection gradient --out indices.json\n"
        "  turnrow train --config recipes/sst2.yaml --method.indices indices.json"
    )


def run(args: argparse.Namespace) -> int:
    """Choose, write the file and show what was chosen."""
    from turnrow.files import check_output
    from turnrow.training import Recipe

    out = Path(args.out)
    # what can be refused is refused before a large model is loaded
    check_output(out, "--out")
    if out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists already; replace it by --overwrite, or give another --out")
    if args.samples is not None and args.samples < 1:
        raise UserError(f"--samples is {args.samples}; give the number of training rows to look at, 1 or more")
    recipe = Recipe.from_yaml(args.config, args.overrides)

    from turnrow.training.calibration import select_indices, write_indices

    selection = select_indices(recipe, args.samples)
    write_indices(out, selection)
    _show(selection)
    print(f"wrote {out}: {selection.mode} by {selection.strategy} in {len(selection.indices())} modules")
    return 0


def _show(selection: Selection) -> None:
    from rich.table import Table

    from turnrow.cli.inspect import short_indices

    console = table_console()
    table = Table(box=None, padding=(0, 1))
    for heading, justify in (("module", "left"), ("weight", "left"), ("chosen", "left"), ("share of score", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for chosen in selection:
        share = "" if chosen.share is None else f"{100 * chosen.share:.1f} %"
        index = f"{chosen.part} {short_indices(chosen.index.tolist())}"
        table.add_row(chosen.module, " x ".join(map(str, chosen.shape)), index, share)
    console.print(table)
