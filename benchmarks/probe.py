"""Is a probe right? Its ranking of methods, before training, against real fine-tunings: the kept runs of the suites.

For each data set every method is taken that has been fine-tuned with all its seeds and whose kernel a probe knows. The probe sees the
training rows that the runs had, and holds out others of them. Compared is Spearman's rank correlation with the mean test score of the
fine-tunings: of the probe's score, of the nearness to the kernel of full fine-tuning, and, as what must be beaten, of the number of trained
parameters alone.

    python -m benchmarks.probe --data DIR --tasks sst2 trec --threads 1          # a file for each data set; those that are there are skipped
    python -m benchmarks.probe --show
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks import environment
from benchmarks.arguments import add_data, need_data
from benchmarks.results import plus_minus, write
from benchmarks.suite.measure import data_of
from benchmarks.suite.store import RUNS
from benchmarks.suite.suite import Cell, load_suite
from benchmarks.suite.summary import summarize
from turnrow.errors import UserError
from turnrow.training import Recipe, probe
from turnrow.training.probing.kernels import KERNEL_METHODS

__all__ = ["PREDICTORS", "correlations", "main", "markdown", "measured", "run"]

FOLDER = Path(__file__).parent / "results" / "probe"
PREDICTORS = {
    "score": "the probe's score",
    "nearness": "nearness to the full kernel, p = 2",
    "parameters": "number of trained parameters",
}
_SUITES = ("minilm", "ablations")
_LEAST = 6
"""Methods without which a rank correlation is not worth printing."""


def measured(task: str, root: Path = RUNS) -> list[tuple[str, Cell, tuple[float, ...]]]:
    """The methods with a known kernel that were fine-tuned on a task with every seed: name, cell, test scores in percent."""
    found: dict[str, tuple[str, Cell, tuple[float, ...]]] = {}
    for suite in map(load_suite, _SUITES):
        if task not in suite.tasks:
            continue
        for _, name, fields in suite.methods():
            cell = suite.cell(task, fields)
            summary = summarize(cell, root)
            known = set(fields) == {"method"} and fields["method"]["name"] in KERNEL_METHODS
            if known and not fields["method"].get("use_dora") and summary and len(summary.scores) == len(cell.seeds):
                found.setdefault(cell.slug, (name, cell, summary.scores))
    return list(found.values())


def run(
    task: str, data: Path, *, shots: int, draws: int, rows: int, methods: Sequence[tuple[str, Cell, tuple[float, ...]]]
) -> dict[str, Any]:
    """Probe the methods of one data set."""
    cell = methods[0][1]
    with data_of(data, task, cell.training_rows) as splits:
        recipe = Recipe.from_dict(
            {
                **{name: value for name, value in cell.recipe.items() if name not in ("training", "method")},
                "method": cell.fields["method"],
                "data": {"train": splits["train"], "test": splits["test"]},
                "output_dir": "unused",
            }
        )
        found = probe(
            recipe,
            methods=[cell.fields["method"] for _, cell, _ in methods],
            shots=shots,
            draws=draws,
            rows=rows,
            measure_steps=False,
        )
    probed = [(name, found.of(cell.fields["method"]), scores) for name, cell, scores in methods]
    return {
        "format": 1,
        "benchmark": "probe",
        "task": task,
        "model": found.model,
        "metric": found.metric,
        "outputs": found.outputs,
        "shots": shots,
        "seeds": list(found.seeds),
        "held_rows": found.held_rows,
        "start": list(found.start_scores),
        "seconds": found.seconds,
        "machine": environment.machine("cpu"),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "methods": {
            name: {
                "parameters": one.trainable_parameters,
                "scores": list(one.scores),
                "distances": {p: list(values) for p, values in one.distances.items()},
                "fine_tuned": list(scores),
            }
            for name, one, scores in probed
            if one.scores
        },
    }


def correlations(result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Spearman's rho with the mean test score, and its p-value, by predictor."""
    methods = list(result["methods"].values())
    real = [statistics.fmean(one["fine_tuned"]) for one in methods]
    predicted = {
        "score": [statistics.fmean(one["scores"]) for one in methods],
        "nearness": [-statistics.fmean(one["distances"]["p = 2"]) for one in methods],
        "parameters": [one["parameters"] for one in methods],
    }
    found = {name: spearmanr(values, real) for name, values in predicted.items()}
    return {name: (float(rho), float(p)) for name, (rho, p) in found.items()}


def markdown(folder: Path = FOLDER) -> str:
    """The correlations of every data set, and their mean; then what they are of."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise UserError(f"there are no results in {folder}")
    rows = []
    means: dict[str, list[float]] = {name: [] for name in PREDICTORS}
    without: dict[str, list[float]] = {name: [] for name in PREDICTORS}
    for result in results:
        found = correlations(result)
        for name, (rho, _) in found.items():
            means[name].append(rho)
        # Full fine-tuning has the kernel that the others are held against.
        rest = {name: one for name, one in result["methods"].items() if name != "full"}
        for name, (rho, _) in correlations({**result, "methods": rest}).items():
            without[name].append(rho)
        cells = [f"{rho:+.2f} (p = {p:.2f})" for rho, p in found.values()]
        rows.append(f"| {result['task']} | {len(result['methods'])} | {' | '.join(cells)} | {_gap(result)} |")
    average, average_without = (
        " | ".join(f"**{statistics.fmean(values):+.2f}**" for values in found.values()) for found in (means, without)
    )
    last = [f"| mean | | {average} | |", f"| mean, full fine-tuning left out | | {average_without} | |"]
    head = f"| data set | methods | {' | '.join(PREDICTORS.values())} | lost by taking the probe's first |"
    parts = ["\n".join([head, "|---|--:|" + "--:|" * (len(PREDICTORS) + 1), *rows, *last])]
    for result in results:
        lines = [
            "| {} | probe | distance, p = 2 | trained | fine-tuned |".format(result["task"]),
            "|---|--:|--:|--:|--:|",
        ]
        ordered = sorted(result["methods"].items(), key=lambda one: -statistics.fmean(one[1]["scores"]))
        for name, one in ordered:
            distance = statistics.fmean(one["distances"]["p = 2"])
            scores, real = [100 * score for score in one["scores"]], one["fine_tuned"]
            lines.append(
                f"| {name} | {plus_minus(scores)} | {distance:.2f} | {one['parameters']:,} | {plus_minus(real)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _gap(result: Mapping[str, Any]) -> str:
    """How far the method that the probe ranks first is below the best, in points; beside that, a method at random."""
    methods = list(result["methods"].values())
    real = [statistics.fmean(one["fine_tuned"]) for one in methods]
    first = max(range(len(methods)), key=lambda number: statistics.fmean(methods[number]["scores"]))
    return f"{max(real) - real[first]:.1f} (at random {max(real) - statistics.fmean(real):.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data(parser)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec", "cola", "mr"], help="default: %(default)s")
    parser.add_argument("--shots", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--draws", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=200, help="held out; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch; default: as it comes")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results; default: %(default)s")
    parser.add_argument("--again", action="store_true", help="replace results that are there")
    parser.add_argument("--show", action="store_true", help="print the tables of what is there")
    args = parser.parse_args(argv)
    try:
        if args.show:
            print(markdown(args.folder))
            return 0
        need_data(parser, args.data, args.tasks)
        if args.threads:
            torch.set_num_threads(args.threads)
        for task in args.tasks:
            path = args.folder / f"{task}.json"
            if path.exists() and not args.again:
                continue
            methods = measured(task)
            if len(methods) < _LEAST:
                print(f"{task}: {len(methods)} methods were fine-tuned with every seed; {_LEAST} are needed")
                continue
            result = run(task, args.data, shots=args.shots, draws=args.draws, rows=args.rows, methods=methods)
            write(result, path)
            print(f"{task}: {correlations(result)}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
