"""What the command lines of benchmarks have in common, so that it is called and refused alike."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from benchmarks.results import result_file

__all__ = [
    "add_data",
    "add_kept_result",
    "add_result",
    "add_shape",
    "add_threads",
    "check_positive",
    "kept_result",
    "need_data",
]


def add_shape(parser: argparse.ArgumentParser, shapes: Collection[str], dtypes: Collection[str], default: str) -> None:
    """``--shape``, ``--device`` and ``--dtype``: of which model, where, and in what."""
    parser.add_argument("--shape", choices=shapes, default=default, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...; default: %(default)s")
    parser.add_argument("--dtype", choices=dtypes, help="of the base weights; default: the shape's")


def add_threads(parser: argparse.ArgumentParser, default: int) -> None:
    """``--threads``, of torch."""
    parser.add_argument("--threads", type=int, default=default, help="CPU threads of torch; default: %(default)s")


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data``: where the data sets lie."""
    parser.add_argument("--data", type=Path, help="the folder with the tasks' folders, TASK/train.jsonl.gz and so on")


def add_result(parser: argparse.ArgumentParser) -> None:
    """``--output`` and ``--show``: a result is written where one says, and a written one is shown."""
    parser.add_argument("--output", type=Path, help="JSON file to write, else only the table is printed")
    parser.add_argument(
        "--show", type=result_file, metavar="FILE", help="print the table of a result file; measure nothing"
    )


def add_kept_result(parser: argparse.ArgumentParser, default: Path) -> None:
    """``--output``, ``--plot`` and ``--show``: a result that has its place, and grows there."""
    parser.add_argument("--output", type=Path, default=default, help="JSON file; default: %(default)s")
    parser.add_argument("--plot", type=Path, help="where to draw the plot, .png or .svg")
    parser.add_argument("--show", action="store_true", help="print the table of what is there and end")


def kept_result(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The result of ``--output`` that ``--show`` asks for; an error of the command line where there is none."""
    if not path.is_file():
        parser.error(f"there is no result {path}")
    return json.loads(path.read_text())


def check_positive(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str) -> None:
    """End with an error for the first of these arguments that is given and less than one."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be at least 1")


def need_data(parser: argparse.ArgumentParser, folder: Path | None, tasks: Iterable[str]) -> None:
    """End with an error where ``--data`` does not hold the training split of every task."""
    for task in tasks:
        if folder is None or not (folder / task / "train.jsonl.gz").is_file():
            parser.error(f"--data is {folder}; name the folder that holds {task}/train.jsonl.gz")
