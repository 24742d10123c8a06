"""Tables in Markdown, made from the files of runs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.suite.cost import COSTS, Cost, method_costs, read_costs
from benchmarks.suite.store import RUNS
from benchmarks.suite.suite import Suite
from benchmarks.suite.summary import Summary, known_tasks, summarize

__all__ = ["cost_table", "overview", "task_tables"]


def overview(suite: Suite, root: Path = RUNS) -> str:
    """Every method by every task: mean ± standard deviation; the mean over tasks where all are there. Each method once.

    What is trained is that of the first task that is known: a head has an output a class.
    """
    tasks = known_tasks(suite, root)
    lines = [f"| | trained | {' | '.join(tasks)} | mean |", f"|---|{'--:|' * (len(tasks) + 2)}"]
    for _, name, fields in suite.methods():
        found = [summarize(suite.cell(task, fields), root) for task in tasks]
        if not any(found):
            continue
        trained = next(summary.trained for summary in found if summary)
        cells = [summary.text() if summary else "" for summary in found]
        lines.append(f"| {name} | {trained:,} | {' | '.join(cells)} | {_mean(found)} |")
    return "\n".join(lines)


def cost_table(suite: Suite, root: Path = COSTS) -> str:
    """What a training step of each method was measured to cost, with the circumstances; empty where nothing was."""
    measured = read_costs(suite.name, root=root)
    if measured is None:
        return ""
    given, machine = measured.settings, measured.machine
    where = machine.get("accelerator") or f"{machine['threads']} threads of {machine['processor']}"
    lines = [
        f"A step on {given['batch']} rows of {given['sequence']} tokens, {given['dtype']}, {where}; all methods in one run, interleaved, "
        f"{given['rounds']} rounds, against a forward and a backward to the embeddings of the frozen model; weights not counted in the peak.",
        "",
        "| | step, × frozen | quartiles | step, ms | step, peak MiB |",
        "|---|--:|--:|--:|--:|",
    ]
    names = {suite.cell(suite.tasks[0], fields).slug: name for _, name, fields in suite.methods()}
    for slug, cost in sorted(measured.methods.items(), key=lambda method: method[1]["ratio"]["median"]):
        low, high = cost["ratio"]["quartiles"]
        lines.append(
            f"| {names.get(slug, cost['title'])} | {cost['ratio']['median']:.2f} | {low:.2f} to {high:.2f} "
            f"| {cost['seconds']['median'] * 1e3:,.0f} | {cost['peak_bytes'] / 2**20:,.0f} |"
        )
    return "\n".join(lines)


def task_tables(
    suite: Suite, task: str, groups: Sequence[str] | None = None, root: Path = RUNS
) -> Iterator[tuple[str, str]]:
    """Yield (group, table) of one task: trained parameters, score, learning rate, and what a step was measured to cost."""
    costs = method_costs(suite.name)
    for group in groups or suite.groups:
        cells = {name: suite.cell(task, fields) for name, fields in suite.groups[group].items()}
        rows = [
            _row(name, summary, costs.get(cell.slug))
            for name, cell in cells.items()
            if (summary := summarize(cell, root))
        ]
        if rows:
            head = "| | trained | test | seeds | learning rate | step, × frozen | step, peak MiB |\n|---|--:|--:|--:|--:|--:|--:|"
            yield group, "\n".join([head, *rows])


def _row(name: str, found: Summary, cost: Cost | None) -> str:
    step, memory = (f"{cost['ratio']['median']:.2f}", f"{cost['peak_bytes'] / 2**20:,.0f}") if cost else ("", "")
    return f"| {name} | {found.trained:,} | {found.score()} | {len(found.scores)} | {found.learning_rate:g} | {step} | {memory} |"


def _mean(found: Sequence[Summary | None]) -> str:
    known = [summary.mean for summary in found if summary]
    return f"{sum(known) / len(known):.1f}" if len(known) == len(found) else ""
