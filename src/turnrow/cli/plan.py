"""``turnrow plan``: what a run would take in memory, before any weight is loaded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from turnrow.cli.console import FILE_WIDTH, table_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from turnrow.training import Plan

__all__ = ["HELP", "NAME", "TAKES_OVERRIDES", "add_arguments", "run"]

NAME = "plan"
HELP = "forecast parameters and memory of a recipe's run and of other methods, without loading weights"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; any other ``--field value`` overrides the recipe."""
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="N",
        help="rows on one device, one or several sizes (default: the recipe's)",
    )
    parser.add_argument(
        "--sequence", type=int, metavar="N", help="tokens a row (default: the longest input that the run would not cut)"
    )
    parser.add_argument("--memory", metavar="SIZE", help="say which batch fits, into for example 24GB or 80GiB")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.epilog = (
        "The model may be a folder with nothing but config.json. Any field of the recipe can be set here too:\n"
        "  turnrow plan --config recipes/sst2.yaml --model path/to/llama --dtype bfloat16 --batch 1 8 --memory 24GB"
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from rich.console import Console

    from turnrow.training import Recipe, plan
    from turnrow.training.sizes import parse_bytes

    memory = None if args.memory is None else parse_bytes(args.memory)
    recipe = Recipe.from_yaml(args.config, args.overrides)
    with Console(stderr=True).status("reading the model's config") as status:
        planned = plan(
            recipe,
            batches=args.batch,
            sequence=args.sequence,
            memory=memory,
            on_method=lambda title: status.update(f"a step of {title}, without values"),
        )
    if args.json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        _show(planned, table_console(), args.memory)
    return 0


def _show(plan: Plan, console: Console, memory: str | None) -> None:
    from rich.measure import Measurement

    weights = f"base weights in {plan.dtype}"
    if plan.quantization is not None:
        weights += f", quantized by {plan.quantization}"
    step = [
        f"{weights} (full: float32)",
        *([f"autocast to {plan.precision}"] if plan.precision != "float32" else []),
        *(["checkpointing"] if plan.checkpointing else []),
        plan.optimizer,
        *([f"{plan.micro_steps} micro-steps"] if plan.micro_steps > 1 else []),
    ]
    head = "" if plan.labels is None else f"{plan.labels} labels, "
    facts = [
        f"{plan.model}, {head}{plan.sequence:,} tokens a row, on {plan.device}",
        ", ".join(step),
    ]
    console.print("\n".join(facts))
    sizes, steps = _columns(plan, memory)
    whole = _table(plan, sizes | steps)
    # Not by console.measure, which says no more than the width that there is.
    if Measurement.get(console, console.options.update_width(FILE_WIDTH), whole).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(plan, sizes), _table(plan, steps), sep="\n")
    for method in plan.methods:
        if method.note:
            console.print(f"{method.title}: {method.note}")
    for note in plan.notes:
        console.print(f"assumed: {note}")
    console.print(
        "xN: a batch of N rows; saved: what a forward keeps for its backward; peak: the most at any moment of training, "
        "weights included" + ("" if memory is None else f"; fits: the largest batch whose peak is within {memory}")
    )
    console.print(f"not in the forecast: {'; '.join(plan.not_covered)}")


Columns = dict[str, list[str]]


def _columns(plan: Plan, memory: str | None) -> tuple[Columns, Columns]:
    """What does not depend on the batch, and what does: the cells under each head, one a method."""
    from turnrow.training.sizes import readable_bytes

    def size(value: int | None) -> str:
        return "?" if value is None else readable_bytes(value)

    def number(value: int | None) -> str:
        return "?" if value is None else f"{value:,}"

    methods = plan.methods
    sizes = {
        "trained": [number(method.trainable_parameters) for method in methods],
        "base": [size(method.base_bytes) for method in methods],
        "adapter": [size(method.adapter_bytes) for method in methods],
        "gradients": [size(method.gradient_bytes) for method in methods],
        "optimizer": [size(method.optimizer_bytes) for method in methods],
    }
    steps: Columns = {}
    for position, forecast in enumerate(methods[0].batches):
        of_methods = [method.batches[position] if method.batches else None for method in methods]
        steps[f"saved x{forecast.batch}"] = [size(one.saved_bytes if one else None) for one in of_methods]
        steps[f"peak x{forecast.batch}"] = [size(one.peak_bytes if one else None) for one in of_methods]
    if plan.memory is not None:
        steps[f"fits {memory}"] = [number(method.largest_batch) for method in methods]
    return sizes, steps


def _table(plan: Plan, columns: Columns) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1))
    table.add_column("method", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for method, *cells in zip(plan.methods, *columns.values(), strict=True):
        table.add_row(method.title, *cells)
    return table
