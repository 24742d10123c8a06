"""``turnrow probe``: which method will do, before any training."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnrow.cli.console import table_console
from turnrow.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from turnrow.training import Probe

__all__ = ["HELP", "NAME", "TAKES_OVERRIDES", "add_arguments", "run"]

NAME = "probe"
HELP = "rank methods on a recipe's data and model by few-shot kernels, before any training"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; any other ``--field value`` overrides the recipe."""
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument(
        "--candidate",
        action="append",
        metavar="METHOD",
        help="compare this method instead of the usual ones, such as '{name: rocoft, mode: row, r: 3}'; may be repeated",
    )
    parser.add_argument("--shots", type=int, default=16, metavar="N", help="training rows of each class (default: 16)")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="draws of them (default: 3)")
    parser.add_argument("--rows", type=int, default=200, metavar="N", help="held-out rows to score on (default: 200)")
    parser.add_argument("--no-steps", action="store_true", help="do not measure training steps")
    parser.add_argument("--html", metavar="FILE", help="write a page with a picture")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.epilog = (
        "The test split is not read. What the ranking is worth: docs/probe.md.\n"
        "  turnrow probe --config recipes/demo-rocoft.yaml --html probe.html"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found."""
    from rich.console import Console

    from turnrow.training import Recipe, probe, write_probe

    if args.html and Path(args.html).is_dir():
        raise UserError(
            f"--html {args.html!r} is a folder; give the path of a file, such as {str(Path(args.html) / 'probe.html')!r}"
        )
    methods = None if args.candidate is None else [_method(text) for text in args.candidate]
    recipe = Recipe.from_yaml(args.config, args.overrides)
    with Console(stderr=True).status("starting") as status:
        found = probe(
            recipe,
            methods=methods,
            shots=args.shots,
            draws=args.draws,
            rows=args.rows,
            measure_steps=not args.no_steps,
            on_stage=status.update,
        )
    if args.html:
        write_probe(args.html, found)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found, table_console())
        if args.html:
            print(f"page: {args.html}")
    return 0


def _method(text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"--candidate is {text!r}; expected the method of a recipe, such as '{{name: rocoft, mode: row, r: 3}}'"
        )
    return value


def _show(probe: Probe, console: Console) -> None:
    from rich.table import Table

    from turnrow.training.sizes import readable_bytes

    console.print(
        f"{probe.model}, task {probe.task}: {probe.shots} rows of each class, {len(probe.seeds)} draws, scored on "
        f"{probe.held_rows} rows of {probe.held_from}\n"
        f"kernels of: {probe.outputs}; {probe.metric} before training {statistics.fmean(probe.start_scores):.3f}"
    )
    table = Table(box=None, padding=(0, 1))
    table.add_column("method", no_wrap=True)
    for name in (probe.metric, "±", "p=1", "p=2", "trained", "step", "memory"):
        table.add_column(name, justify="right", no_wrap=True)

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    for one in probe.methods:
        table.add_row(
            one.title,
            cell(one.score, "{:.3f}"),
            cell(one.spread, "{:.3f}"),
            cell(one.distance(1), "{:.2f}"),
            cell(one.distance(2), "{:.2f}"),
            cell(one.trainable_parameters, "{:,}"),
            cell(one.step_seconds, "{:.3f} s"),
            "-" if one.peak_bytes is None else readable_bytes(one.peak_bytes),
        )
    console.print(table)
    for one in probe.methods:
        if one.note:
            console.print(f"{one.title}: {one.note}")
    console.print(
        f"±: over the draws; p=1, p=2: distance to the kernel of full fine-tuning; step and memory: {probe.batch} rows of {probe.sequence} "
        f"tokens on {probe.device}\nnothing was trained: a score is what kernel regression on so few rows reaches; differences within ± say nothing\n"
        "of real fine-tunings the distance has said more than the score: leave out what is far, train two or three of the rest"
    )
