"""Tables in Markdown, made from the files of runs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.suite.store import RUNS
from benchmarks.suite.suite import Suite
from benchmarks.suite.summary import Summary, summarize

__all__ = ["overview", "task_tables"]


def overview(suite: Suite, root: Path = RUNS) -> str:
    """Every method by every task: mean ± standard deviation; the mean over tasks where all are there."""
    tasks = [task for task in suite.tasks if any(_known(suite, task, root))]
    lines = [f"| | trained | {' | '.join(tasks)} | mean |", f"|---|{'--:|' * (len(tasks) + 2)}"]
    for methods in suite.groups.values():
        for name, fields in methods.items():
            found = [summarize(suite.cell(task, fields), root) for task in tasks]
            if not any(found):
                continue
            trained = min(summary.trained for summary in found if summary)
            cells = [summary.text() if summary else "" for summary in found]
            lines.append(f"| {name} | {trained:,} | {' | '.join(cells)} | {_mean(found)} |")
    return "\n".join(lines)


def task_tables(
    suite: Suite, task: str, groups: Sequence[str] | None = None, root: Path = RUNS
) -> Iterator[tuple[str, str]]:
    """Yield (group, table) of one task: trained parameters, score, step time, memory, learning rate."""
    for group in groups or suite.groups:
        rows = [
            _row(name, summary)
            for name, fields in suite.groups[group].items()
            if (summary := summarize(suite.cell(task, fields), root))
        ]
        if rows:
            head = "| | trained | test | seeds | s / step | peak MiB | learning rate |\n|---|--:|--:|--:|--:|--:|--:|"
            yield group, "\n".join([head, *rows])


def _row(name: str, found: Summary) -> str:
    memory = f"{found.peak_memory / 2**20:,.0f}" if found.peak_memory else ""
    spread = "" if found.deviation is None else f" ± {found.deviation:.1f}"
    return (
        f"| {name} | {found.trained:,} | {found.mean:.1f}{spread} | {len(found.scores)} | {found.seconds_per_step:.2f} "
        f"| {memory} | {found.learning_rate:g} |"
    )


def _known(suite: Suite, task: str, root: Path) -> Iterator[bool]:
    for methods in suite.groups.values():
        for fields in methods.values():
            yield summarize(suite.cell(task, fields), root) is not None


def _mean(found: Sequence[Summary | None]) -> str:
    known = [summary.mean for summary in found if summary]
    return f"{sum(known) / len(known):.1f}" if len(known) == len(found) else ""
