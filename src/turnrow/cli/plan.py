"""``turnrow plan``: what a run would take in memory, before any weight is loaded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from turnrow.training import Plan
    from turnrow.training.planning import MethodPlan

__all__ = ["HELP", "NAME", "TAKES_OVERRIDES", "add_arguments", "run"]

NAME = "plan"
HELP = "forecast parameters and memory of a recipe's run and of other methods, without loading weights"
TAKES_OVERRIDES = True

# In a file or a pipe there is no edge of the screen to break lines at.
_FILE_WIDTH = 240


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
        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console.width = _FILE_WIDTH
        _show(planned, console, args.memory)
    return 0


def _show(plan: Plan, console: Console, memory: str | None) -> None:
    from rich.table import Table

    facts = [
        f"{plan.model}, {plan.labels} labels, {plan.sequence:,} tokens a row, on {plan.device}",
        f"base weights in {plan.dtype} (full: float32), computed in {plan.precision}"
        f"{', checkpointing' if plan.checkpointing else ''}, {plan.optimizer}"
        f"{f', {plan.micro_steps} micro-steps' if plan.micro_steps > 1 else ''}",
    ]
    console.print("\n".join(facts))
    table = Table(box=None, padding=(0, 1))
    table.add_column("method")
    for name in ("trained", "base", "adapter", "gradients", "optimizer"):
        table.add_column(name, justify="right")
    for forecast in plan.methods[0].batches:
        table.add_column(f"saved x{forecast.batch}", justify="right")
        table.add_column(f"peak x{forecast.batch}", justify="right")
    if plan.memory is not None:
        table.add_column(f"fits {memory}", justify="right")
    for method in plan.methods:
        table.add_row(*_cells(method, plan))
    console.print(table)
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


def _cells(method: MethodPlan, plan: Plan) -> list[str]:
    from turnrow.training.sizes import readable_bytes

    def size(value: int | None) -> str:
        return "?" if value is None else readable_bytes(value)

    trained = "?" if method.trainable_parameters is None else f"{method.trainable_parameters:,}"
    cells = [method.title, trained]
    cells += map(size, (method.base_bytes, method.adapter_bytes, method.gradient_bytes, method.optimizer_bytes))
    for forecast in method.batches:
        cells += [size(forecast.saved_bytes), size(forecast.peak_bytes)]
    if plan.memory is not None and method.batches:
        cells.append("?" if method.largest_batch is None else f"{method.largest_batch:,}")
    return cells
