"""Run a suite of real fine-tunings, or show what is known.

    python -m benchmarks.suite run minilm --data DIR --tasks sst2 --groups RoAd
    python -m benchmarks.suite show minilm
    python -m benchmarks.suite show ablations --tasks sst2
    python -m benchmarks.suite cost minilm --threads 2               # what a training step of each method costs
    python -m benchmarks.suite report --html build/results.html      # docs/results.md with its pictures, and one page

DIR holds a folder for each task with ``train.jsonl.gz``, ``validation.jsonl.gz`` and ``test.jsonl.gz``. Each run's result is a JSON file
in ``benchmarks/results/runs``; what is there is not run again, so a killed suite goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.suite.cost import measure_costs
from benchmarks.suite.plots import plot_task
from benchmarks.suite.report import write_html, write_results
from benchmarks.suite.runner import run_cells
from benchmarks.suite.suite import Suite, load_suite, suite_names
from benchmarks.suite.tables import overview, task_tables
from turnrow.errors import UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("run", "show", "cost", "report"))
    parser.add_argument("suite", nargs="?", help=f"one of {', '.join(suite_names())}")
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--groups", nargs="+", help="default: all")
    parser.add_argument("--methods", nargs="+", help="by the names in the suite's file; default: all")
    parser.add_argument("--data", type=Path, help="the folder with the tasks' folders")
    parser.add_argument("--workers", type=int, default=1, help="cells at once, through Ray; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for each; default: %(default)s")
    parser.add_argument("--plots", type=Path, help="with show: draw a PNG a task into this folder")
    parser.add_argument("--device", default="cpu", help="with cost; default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="with cost: of the base's weights; default: %(default)s")
    parser.add_argument("--batch", type=int, help="with cost: rows; default: the suite's")
    parser.add_argument("--sequence", type=int, help="with cost: tokens a row; default: the suite's")
    parser.add_argument("--rounds", type=int, default=9, help="with cost: steps of each method; default: %(default)s")
    parser.add_argument("--html", type=Path, help="with report: also write one HTML page with the pictures inside")
    args = parser.parse_args(argv)
    if args.action == "report":
        print(write_results())
        if args.html:
            write_html(args.html)
            print(args.html)
        return 0
    if args.suite is None:
        parser.error(f"{args.action} needs the name of a suite: {', '.join(suite_names())}")
    try:
        suite = load_suite(args.suite)
        cells = list(suite.cells(_tuple(args.tasks), _tuple(args.groups), _tuple(args.methods)))
        if args.action == "cost":
            torch.set_num_threads(args.threads)
            shape = {"batch": args.batch, "sequence": args.sequence}
            print(measure_costs(suite, device=args.device, dtype=args.dtype, rounds=args.rounds, **shape))
            return 0
        if args.action == "show":
            _show(suite, args.tasks, args.groups, args.plots)
            return 0
        if args.data is None:
            parser.error("run needs --data")
        broken = run_cells(cells, args.data, workers=args.workers, threads=args.threads)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    for cell in broken:
        print(f"broke down: {cell.task}: {cell.slug}", file=sys.stderr)
    return 1 if broken else 0


def _show(suite: Suite, tasks: list[str] | None, groups: list[str] | None, plots: Path | None) -> None:
    if tasks is None:
        print(f"{suite.title}: test metric, mean ± standard deviation over three seeds (fewer in brackets)\n")
        print(overview(suite))
    for task in tasks or ():
        for group, table in task_tables(suite, task, groups):
            print(f"\n{task}, {group}\n\n{table}")
    for task in (tasks or suite.tasks) if plots else ():
        assert plots is not None
        if plot_task(suite, task, plots / f"{suite.name}-{task}.png"):
            print(f"\n{plots / f'{suite.name}-{task}.png'}")


def _tuple(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


if __name__ == "__main__":
    sys.exit(main())
