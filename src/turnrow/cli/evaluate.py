"""``turnrow evaluate``: the metrics of a saved adapter on labelled rows."""

from __future__ import annotations

import argparse
import json

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "evaluate"
HELP = "compute the metrics of a saved adapter; on the run's test split, exactly the run's figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="the folder 'adapter' of a run")
    parser.add_argument("--data", required=True, metavar="FILE", help="labelled rows: a file or a hub id")
    parser.add_argument("--split", default="test", help="which split of a hub data set (default: test)")
    parser.add_argument("--model", metavar="BASE", help="where the base model lies now, if it has moved")
    parser.add_argument("--output", metavar="FILE", help="also write the metrics there, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the metrics as JSON, in full precision."""
    from pathlib import Path

    from turnrow.training import evaluate_adapter
    from turnrow.training.folder import write_json

    metrics = evaluate_adapter(args.adapter, args.data, split=args.split, model=args.model)
    print(json.dumps(metrics, indent=2))
    if args.output:
        write_json(Path(args.output), metrics)
    return 0
