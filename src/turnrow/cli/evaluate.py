"""``turnrow evaluate``: the metrics of a saved adapter on labelled rows, or on tasks of the evaluation harness."""

from __future__ import annotations

import argparse
import json
from typing import Any

from turnrow.errors import UserError

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "evaluate"
HELP = "compute the metrics of a saved adapter; on the run's test split, exactly the run's figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="the folder 'adapter' of a run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="FILE", help="labelled rows: a file or a hub id")
    source.add_argument("--harness", metavar="TASKS", help="tasks of lm-evaluation-harness, joined by commas")
    parser.add_argument("--split", default="test", help="which split of a hub data set (default: test)")
    parser.add_argument("--model", metavar="BASE", help="where the base model lies now, if it has moved")
    parser.add_argument("--output", metavar="FILE", help="also write the metrics there, as JSON")
    harness = parser.add_argument_group("with --harness")
    harness.add_argument("--include-path", metavar="DIR", help="a folder with YAML files of tasks of your own")
    harness.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt")
    harness.add_argument("--limit", type=int, metavar="N", help="rows of each task, for a quick look")
    harness.add_argument("--batch-size", type=int, metavar="N", help="rows at once (default: 8)")
    harness.add_argument("--chat", action="store_true", help="prompts in the tokenizer's form of conversations")


def run(args: argparse.Namespace) -> int:
    """Print the metrics as JSON, in full precision."""
    from pathlib import Path

    from turnrow.files import check_output, finite_or_null, write_json

    if args.output:
        check_output(Path(args.output), "--output")
    metrics = _on_rows(args) if args.harness is None else _by_harness(args)
    print(json.dumps(finite_or_null(metrics), indent=2))
    if args.output:
        write_json(Path(args.output), metrics)
    return 0


def _on_rows(args: argparse.Namespace) -> dict[str, Any]:
    from turnrow.training import evaluate_adapter

    for option in ("include_path", "num_fewshot", "limit", "batch_size", "chat"):
        given = getattr(args, option)
        if given is not None and given is not False:  # 0 is given too
            raise UserError(f"--{option.replace('_', '-')} is for the harness: give --harness TASKS in place of --data")
    return evaluate_adapter(args.adapter, args.data, split=args.split, model=args.model)


def _by_harness(args: argparse.Namespace) -> dict[str, Any]:
    from turnrow.training.harness import evaluate_with_harness

    return evaluate_with_harness(
        args.adapter,
        [name.strip() for name in args.harness.split(",") if name.strip()],
        model=args.model,
        include=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=8 if args.batch_size is None else args.batch_size,
        chat=args.chat,
    )
