"""``turnrow predict``: what a saved adapter says of new rows."""

from __future__ import annotations

import argparse
import json

from turnrow.errors import UserError

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "predict"
HELP = "predict with a saved adapter, for a file or for a text given here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="the folder 'adapter' of a run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="FILE", help="rows, with or without labels: a file or a hub id")
    source.add_argument("--text", action="append", metavar="TEXT", help="one text; for a task on pairs, give it twice")
    parser.add_argument("--split", default="test", help="which split of a hub data set (default: test)")
    parser.add_argument("--model", metavar="BASE", help="where the base model lies now, if it has moved")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write JSON lines there, or one JSON list if it ends in .json, instead of printing",
    )


def run(args: argparse.Namespace) -> int:
    """Print one JSON object per example, or write them to a file."""
    from turnrow.files import finite_or_null
    from turnrow.training import predict

    data = args.data if args.text is None else [_example(args.adapter, args.text)]
    rows = predict(
        args.adapter, data, split=args.split, output=args.output, model=args.model, quiet=args.text is not None
    )
    if args.output is None:
        for row in rows:
            print(json.dumps(finite_or_null(row), ensure_ascii=False))
    return 0


def _example(adapter: str, texts: list[str]) -> dict[str, str]:
    from turnrow.training.saved import saved_task

    columns = saved_task(adapter).input_columns()
    if len(columns) != len(texts):
        raise UserError(
            f"--text was given {len(texts)} times; this adapter's task reads {', '.join(columns)}: give it {len(columns)} times"
        )
    return dict(zip(columns, texts, strict=True))
