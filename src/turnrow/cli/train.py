"""``turnrow train``: fine-tune as a recipe says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turnrow.training import RunResult

__all__ = ["HELP", "NAME", "TAKES_OVERRIDES", "add_arguments", "run"]

NAME = "train"
HELP = "fine-tune as a recipe says, evaluate on the test split before and after"
TAKES_OVERRIDES = True


class _RecipeHelp(argparse.Action):
    """``--help-recipe``: the fields of a recipe, which need the heavy imports that plain ``--help`` avoids."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from turnrow.training.recipe import recipe_help

        print(recipe_help())
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments; any other ``--field value`` overrides the recipe."""
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the output folder and start anew")
    parser.add_argument("--help-recipe", action=_RecipeHelp, nargs=0, help="show the fields of a recipe and exit")
    parser.epilog = (
        "Any field of the recipe can be set here too, a section's field with a dot:\n"
        "  turnrow train --config recipes/sst2.yaml --method.r 1 --training.learning_rate 1e-3 --seed 1\n"
        "and a section as a whole:\n"
        "  turnrow train --config recipes/sst2.yaml --method '{name: lora, r: 8}' --output_dir runs/lora"
    )


def run(args: argparse.Namespace) -> int:
    """Train, then show the figures."""
    from turnrow.training import Recipe, train
    from turnrow.training.processes import is_first

    result = train(Recipe.from_yaml(args.config, args.overrides), resume=args.resume, overwrite=args.overwrite)
    if is_first():
        _show(result)
    return 0


def _show(result: RunResult) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = result.metrics
    table = Table()
    table.add_column(f"{metrics['method']}: test metric")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, after in metrics["after"].items():
        style = "bold" if name == metrics["main_metric"] else None
        table.add_row(name, _figure(metrics["before"][name]), _figure(after), style=style)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    trained, total, seconds = (metrics[n] for n in ("trainable_parameters", "total_parameters", "seconds_per_step"))
    console.print(f"trained {trained:,} of {total:,} parameters ({100 * trained / total:.3g} %)")
    console.print(f"{metrics['steps']:,} steps" + ("" if seconds is None else f", {seconds:.3g} s each"))
    console.print(f"peak memory {metrics['peak_memory_bytes'] / 2**20:,.0f} MiB ({metrics['peak_memory_kind']})")
    for what, path in (("adapter", result.adapter), ("report", result.folder.report)):
        console.print(f"{what}: {path}")


def _figure(value: float | None) -> str:
    """A figure of a test split; ``metrics.json`` has none where it was not finite."""
    return "overflow" if value is None else f"{value:.4f}"
