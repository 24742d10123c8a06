"""The runs of one cell: a learning rate searched on validation with the first seed, then every seed at the best.

The test split decides nothing: it is looked at once a seed, at the learning rate that validation chose.
"""

from __future__ import annotations

import gzip
import random
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import environment
from benchmarks.suite.search import best_searched, still_wanted, validation_score
from benchmarks.suite.store import Store
from benchmarks.suite.suite import Cell
from turnrow.errors import UserError

__all__ = ["data_of", "measure", "split_files"]

_KEPT = (
    "main_metric", "greater_is_better", "trainable_parameters", "total_parameters", "steps", "seconds_per_step",
    "peak_memory_bytes", "peak_memory_kind", "device", "threads", "versions",
)  # fmt: skip


def measure(cell: Cell, folder: Path, store: Store | None = None) -> None:
    """Run what is not there yet. A run that fails says so in its file, and counts as worse than any other.

    Args:
        cell: a method on a task.
        folder: holds a folder of splits for each task.
        store: where runs are kept; by default `Store(cell)`.
    """
    store = store or Store(cell)
    with data_of(folder, cell.task, cell.training_rows) as data, TemporaryDirectory() as scratch:
        kept = Path(scratch)
        best = _search(store, data, kept)
        for seed in cell.seeds:
            run = store.find(best, seed)
            if run is not None and {"test", "failed"} & run.keys():
                continue
            adapter = kept / (f"{best:g}" if seed == cell.seeds[0] else f"seed-{seed}")
            if run is None or not adapter.exists():
                run = _run(cell, data, best, seed, adapter)
            store.add(run if "failed" in run else run | {"test": _evaluate(adapter, data["test"])})


def split_files(folder: Path, task: str) -> dict[str, Path]:
    """Where the splits of a task lie in the folder of the tasks' folders."""
    return {name: folder / task / f"{name}.jsonl.gz" for name in ("train", "validation", "test")}


@contextmanager
def data_of(folder: Path, task: str, rows: int | None) -> Iterator[dict[str, str]]:
    """The splits of a task, the training split cut to `rows` rows that are drawn once for all runs."""
    splits = {name: str(file) for name, file in split_files(folder, task).items()}
    if rows is None:
        yield splits
        return
    lines = gzip.decompress(Path(splits["train"]).read_bytes()).splitlines()
    random.Random(0).shuffle(lines)
    with TemporaryDirectory() as scratch:
        train = Path(scratch) / "train.jsonl"
        train.write_bytes(b"".join(line + b"\n" for line in lines[:rows]))
        yield splits | {"train": str(train)}


def _search(store: Store, data: dict[str, str], kept: Path) -> float:
    cell, runs = store.cell, dict[float, dict[str, Any]]()
    while wanted := still_wanted(runs, cell.rates):
        for rate in wanted:
            run = store.find(rate, cell.seeds[0])
            if run is None:
                run = _run(cell, data, rate, cell.seeds[0], kept / f"{rate:g}")
                store.add(run)
            runs[rate] = run
            for folder in kept.iterdir():  # only the best so far may be asked for again
                if folder.name != f"{best_searched(runs):g}":
                    shutil.rmtree(folder)
    best = best_searched(runs)
    if validation_score(runs[best]) == float("-inf"):
        raise UserError(
            f"no run of {cell.slug!r} on {cell.task} came to an end, that at {best:g} with {runs[best]['failed']}; once that is put right, "
            f"delete {store.folder}"
        )
    return best


def _run(cell: Cell, data: dict[str, str], rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train once and look at the validation split."""
    from turnrow.training import Recipe, train

    run: dict[str, Any] = {
        "learning_rate": rate,
        "seed": seed,
        "recipe": {name: value for name, value in cell.recipe.items() if name not in cell.fields},
        "machine": environment.machine("cpu"),
        **environment.commit(),
    }
    training = {**cell.recipe.get("training", {}), "learning_rate": rate, "disable_tqdm": True}
    try:
        recipe = Recipe.from_dict(
            {
                **cell.recipe,
                "training": training,
                # What a run calls its test split.
                "data": {"train": data["train"], "test": data["validation"]},
                "seed": seed,
                "output_dir": str(folder),
            }
        )
        metrics = train(recipe, overwrite=True).metrics
    except OSError:
        raise  # of the machine, not of the method: a full disk, a file that has gone
    except Exception as error:
        traceback.print_exc()
        return run | {"failed": f"{type(error).__name__}: {error}"}
    return run | {"validation": metrics["after"]} | {name: metrics[name] for name in _KEPT}


def _evaluate(folder: Path, data: str) -> dict[str, float]:
    from turnrow.training import evaluate_adapter

    return evaluate_adapter(folder / "adapter", data, quiet=True)
