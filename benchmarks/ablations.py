"""Ablations by real fine-tuning: 1,000 training rows, a learning rate found on validation, three seeds.

    python -m benchmarks.ablations --data DIR --task sst2 --only rank selection
    python -m benchmarks.ablations --task sst2 --show                # table and plot of what is there

DIR holds a folder for each task with ``train.jsonl.gz``, ``validation.jsonl.gz`` and ``test.jsonl.gz``. The results of each method
lie in a JSON file in ``benchmarks/results/ablations/TASK``; what is there is not run again, so a killed suite goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.experiments.ablations import ABLATIONS, Experiment
from benchmarks.experiments.runs import TASKS, TRAINING_ROWS, Results, Summary, measure, prepare_data, summarize

__all__ = ["main"]

_RESULTS = Path(__file__).parent / "results" / "ablations"


def _summary(experiment: Experiment, task: str) -> Summary | None:
    return summarize(Results(_RESULTS, task, experiment.trains))


def _line(name: str, found: Summary) -> str:
    spread = f" ± {statistics.stdev(found.scores):.1f}" if len(found.scores) > 1 else ""
    return (
        f"| {name} | {found.trained:,} | {statistics.mean(found.scores):.1f}{spread} | {len(found.scores)} "
        f"| {found.learning_rate:g} |"
    )


def _groups(experiments: Sequence[Experiment]) -> list[str]:
    return list(dict.fromkeys(experiment.group for experiment in experiments))


def _show(experiments: Sequence[Experiment], task: str) -> None:
    for group in _groups(experiments):
        found = [(e.name, _summary(e, task)) for e in experiments if e.group == group]
        lines = [_line(name, summary) for name, summary in found if summary]
        if lines:
            print(f"\n{task}, {group}: test metric in %, mean ± standard deviation over seeds\n")
            print("| | trained | test | seeds | learning rate |\n|---|--:|--:|--:|--:|")
            print("\n".join(lines))
    _plot(experiments, task, _RESULTS / f"{task}.png")


def _plot(experiments: Sequence[Experiment], task: str, target: Path) -> None:
    """Test metric against trained parameters, a panel a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = {
        group: [(e.name, found) for e in experiments if e.group == group and (found := _summary(e, task))]
        for group in _groups(experiments)
    }
    points = {group: found for group, found in points.items() if found}
    if not points:
        return
    figure, panels = pyplot.subplots(
        1, len(points), figsize=(1 + 4.5 * len(points), 5), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (group, found) in zip(panels[0], points.items(), strict=True):
        for name, summary in found:
            spread = statistics.stdev(summary.scores) if len(summary.scores) > 1 else 0.0
            axes.errorbar(summary.trained, statistics.mean(summary.scores), yerr=spread, fmt="o", label=name)
        axes.set(xscale="log", xlabel="trained parameters", title=group)
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel(f"{task}, test metric, %, {TRAINING_ROWS:,} training rows")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    groups = _groups(ABLATIONS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with the tasks' folders")
    parser.add_argument("--task", choices=TASKS, default="sst2", help="default: %(default)s")
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
    with prepare_data(arguments.data, arguments.task) as data:
        for experiment in experiments:
            results = Results(_RESULTS, arguments.task, experiment.trains)
            measure(results, data)
            found = summarize(results)
            print(_line(experiment.name, found) if found else f"| {experiment.name} | every run failed |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
