"""turnrow extract: a RoCoFT adapter out of a fully fine-tuned model."""

from __future__ import annotations

import argparse
from pathlib import Path

from turnrow.cli.console import table_console

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "extract"
HELP = "Take what a fully fine-tuned model changed in its base out as a RoCoFT adapter."

_LISTED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--base", metavar="MODEL", required=True, help="folder or Hub id of the model before")
    parser.add_argument("--tuned", metavar="MODEL", required=True, help="folder or Hub id of the model after")
    parser.add_argument(
        "--task", required=True, help="peft's task type, such as SEQ_CLS or CAUSAL_LM, which chooses the class of both"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the adapter")
    parser.add_argument("--mode", default="row", help="row, column, row+column or entry; default: %(default)s")
    parser.add_argument("-r", type=int, help="rows or columns of each weight at most; default: all that changed")
    parser.add_argument("--density", type=float, help="share of the entries of each weight, for mode entry")
    parser.add_argument("--no-biases", action="store_true", help="leave the biases of the linear layers out")


def run(args: argparse.Namespace) -> int:
    """Extract and print what was taken and what was left out."""
    from rich.table import Table

    from turnrow.adapters import extract_adapter, load_for_task
    from turnrow.pretrained import resolve_model

    base, tuned = (load_for_task(resolve_model(location), args.task) for location in (args.base, args.tuned))
    extraction = extract_adapter(
        base,
        tuned,
        args.out,
        mode=args.mode,
        r=args.r,
        density=args.density,
        biases=not args.no_biases,
        task_type=args.task,
        base_name=args.base,
        beside=args.tuned if Path(args.tuned).is_dir() else None,
    )
    print(
        f"wrote {extraction.path}: ROCOFT adapter of {len(extraction.norms)} modules, which leaves out "
        f"{extraction.residual:.2%} of the change (by Frobenius norm)"
    )
    console = table_console()
    table = Table("module", "changed", "left out", box=None, padding=(0, 1))
    worst = sorted(extraction.norms, key=lambda name: extraction.norms[name][1], reverse=True)[:_LISTED]
    for name in worst:
        changed, rest = extraction.norms[name]
        table.add_row(name, f"{changed:.4g}", f"{rest:.4g} ({rest / changed:.1%})")
    console.print(table)
    if extraction.saved_modules:
        print(f"held whole: {', '.join(extraction.saved_modules)}")
    if extraction.left_out:
        most = sorted(extraction.left_out, key=lambda name: extraction.left_out[name], reverse=True)
        named = ", ".join(f"{name} ({extraction.left_out[name]:.4g})" for name in most[:_LISTED])
        print(f"{len(most)} parameters changed that the adapter does not hold, most of all {named}")
    return 0
