"""What adapting a model is worth: one small encoder, three ways to train it, the intents of support tickets.

`make demo` runs it; `python examples/demo.py` does the same once turnrow[demo] is installed. Whatever is added overrides
all three recipes: `python examples/demo.py --seed 1 --training.num_train_epochs 2`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from turnrow.training import RunResult

RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = {
    "head": "a new classification head on the frozen encoder",
    "rocoft": "three rows of every linear layer, and the head",
    "full": "every weight",
}
# Written for this file: they are in none of the splits.
UNSEEN = [
    "Tracking says delivered at noon. Nothing is here.",
    "What is the 3.10 on my last invoice for?",
    "I cancelled on the 2nd and still paid on the 5th. Please send the money back.",
]


def main(overrides: Sequence[str] = ()) -> None:
    """Train by each method, then show what each cost and brought."""
    # The slow imports come after the first line on the screen.
    console = Console(highlight=False)
    console.print(
        "Fine-tuning all-MiniLM-L6-v2 on 352 support tickets; the test split holds 144 others, of eight intents."
    )
    # Between peft and transformers; nothing that a reader of the demo could mend.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("turnrow").setLevel(logging.WARNING)
    from turnrow.training import Recipe, predict, train

    results = {}
    for method, what in METHODS.items():
        console.rule(f"{method}: {what}", align="left")
        results[method] = train(Recipe.from_yaml(RECIPES / f"demo-{method}.yaml", overrides), overwrite=True)
        console.print(_before_and_after(results[method]))
    console.rule("what the RoCoFT adapter makes of three new tickets", align="left")
    rows = [{"text": text} for text in UNSEEN]
    for text, answer in zip(UNSEEN, predict(results["rocoft"].adapter, rows, quiet=True), strict=True):
        console.print(f"{answer['prediction']:<17} {text}", soft_wrap=True)
    console.print()
    console.print(_comparison(results))
    for method, result in results.items():
        console.print(f"{method:<7} adapter: {result.adapter}   report: {result.folder.report}", soft_wrap=True)


def _before_and_after(result: RunResult) -> str:
    before, after = result.metrics["before"]["accuracy"], result.metrics["after"]["accuracy"]
    return f"test accuracy before {before:.1%}, after {after:.1%}, in {result.metrics['steps']} steps"


def _comparison(results: dict[str, RunResult]) -> Table:
    table = Table(title="Intent of a support ticket, test split")
    table.add_column("method")
    for name in ("trainable parameters", "accuracy before", "after", "seconds per step"):
        table.add_column(name, justify="right")
    for method, result in results.items():
        metrics = result.metrics
        share = metrics["trainable_parameters"] / metrics["total_parameters"]
        table.add_row(
            method,
            f"{metrics['trainable_parameters']:,} ({share:.2%})",
            f"{metrics['before']['accuracy']:.1%}",
            f"{metrics['after']['accuracy']:.1%}",
            f"{metrics['seconds_per_step']:.3f}",
        )
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
