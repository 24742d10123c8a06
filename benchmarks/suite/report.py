"""``docs/results.md`` with its pictures, and one HTML page: everything from the files of runs, the published tables marked as such."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt

from benchmarks.suite.cost import method_costs
from benchmarks.suite.plots import plot_task
from benchmarks.suite.published import published_tables, to_markdown
from benchmarks.suite.store import RUNS
from benchmarks.suite.suite import Cell, Suite, load_suite, suite_names
from benchmarks.suite.summary import Summary, failures, known_tasks, summarize
from benchmarks.suite.tables import cost_table, overview, task_tables
from turnrow.files import write_text

__all__ = ["DOCS", "results_page", "write_html", "write_results"]

DOCS = Path(__file__).parents[2] / "docs"
_CLAIMS = Path(__file__).parents[1] / "claims.md.j2"
_RANKS = Path(__file__).parents[1] / "results" / "bert-ranks-cpu.json"
_UNKNOWN = "(not yet run)"

_HEAD = """# Results

What methods are worth on real data, made by `python -m benchmarks.suite report` from the files in `benchmarks/results`; what the papers print stands apart and
is marked. Every method has the same search of its learning rate on the validation split, and the test split decides nothing: three seeds at the best rate are evaluated
on it. Mean ± standard deviation over them, fewer in brackets; a star where rates are left to try, so that a better one may be found; a cell without a figure has not
been run. Accuracy in percent, Matthews' correlation times 100 for CoLA, Pearson's times 100 for STS-B; perplexity as it is. *Trained* counts the head too, that of
the first task with a figure.
"""


def results_page(root: Path = RUNS, figures: str = "figures") -> str:
    """The page as Markdown; pictures are referred to as ``figures/results-SUITE-TASK.png``."""
    parts = [_HEAD]
    for suite in _known_suites(root):
        parts.append(f"## {suite.title}\n\n{overview(suite, root)}")
        parts += [f"![{suite.name}, {task}]({figures}/{_picture(suite, task)})" for task in known_tasks(suite, root)]
        if broken := list(_failed(suite, root)):
            parts.append("Failed runs, which count as worse than any other:\n\n" + "\n".join(broken))
    parts.append(_claims(root))
    parts.append("## What the papers print\n\nPublished figures, none of them measured here.")
    parts += [to_markdown(table) for table in published_tables().values()]
    parts.append(
        "## What a step costs\n\nMeasured apart from the runs above, which shared their machine: `python -m benchmarks.suite cost SUITE`."
    )
    for suite in _known_suites(root):
        if table := cost_table(suite):
            parts.append(f"**{suite.name}**\n\n{table}")
    parts.append("## Every task")
    for suite in _known_suites(root):
        for task in known_tasks(suite, root):
            for group, table in task_tables(suite, task, root=root):
                parts.append(f"**{suite.name}, {task}, {group}**\n\n{table}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write_results(docs: Path = DOCS, root: Path = RUNS) -> Path:
    """Write ``results.md`` and its pictures into `docs`."""
    for suite in _known_suites(root):
        for task in known_tasks(suite, root):
            plot_task(suite, task, docs / "figures" / _picture(suite, task), root)
    target = docs / "results.md"
    write_text(target, results_page(root))
    return target


def write_html(target: Path, docs: Path = DOCS) -> None:
    """Write ``results.md`` as one HTML page with its pictures inside."""
    body = MarkdownIt("commonmark").enable("table").render((docs / "results.md").read_text(encoding="utf-8"))

    def embed(match: re.Match[str]) -> str:
        picture = base64.b64encode((docs / match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{picture}"'

    body = re.sub(r'src="(figures/[^"]+)"', embed, body)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
        "td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;white-space:nowrap}img{max-width:100%}"
        "code{background:#f3f3f3;padding:0 .2rem}"
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>turnrow: results</title><style>{style}</style><body>{body}</body></html>\n"
    )
    write_text(target, page)


def _known_suites(root: Path) -> Iterator[Suite]:
    # The overview of all methods first, the choices within one method after it.
    for name in sorted(suite_names(), key=lambda name: (name == "ablations", name)):
        suite = load_suite(name)
        if known_tasks(suite, root):
            yield suite


def _picture(suite: Suite, task: str) -> str:
    return f"results-{suite.name}-{task}.png"


def _failed(suite: Suite, root: Path) -> Iterator[str]:
    for cell in suite.cells():
        for run in failures(cell, root):
            what = run["failed"].splitlines()[0]
            yield f"- {cell.task}, `{cell.slug}`, learning rate {run['learning_rate']:g}, seed {run['seed']}: {what}"


def _claims(root: Path) -> str:
    suites = {name: load_suite(name) for name in suite_names()}

    def cell(suite: str, task: str, method: str) -> Cell:
        held = suites[suite]
        return held.cell(task, next(methods[method] for methods in held.groups.values() if method in methods))

    def found(suite: str, task: str, method: str) -> Summary | None:
        return summarize(cell(suite, task, method), root)

    def score(suite: str, task: str, method: str) -> str:
        summary = found(suite, task, method)
        return summary.text() if summary else _UNKNOWN

    def scores(suite: str, task: str, *methods: str) -> str:
        return ", ".join(score(suite, task, method) for method in methods)

    def against(task: str, method: str, other: str) -> str:
        return " against ".join(score("ablations", task, name) for name in (method, other))

    def trained(suite: str, task: str, method: str) -> str:
        summary = found(suite, task, method)
        return f"{summary.trained:,}" if summary else _UNKNOWN

    def peak(method: str) -> str:
        cost = method_costs("minilm")[cell("minilm", "sst2", method).slug]
        return f"{cost['peak_bytes'] / 2**20:,.0f}"

    environment = Environment(undefined=StrictUndefined, autoescape=False)
    template = environment.from_string(_CLAIMS.read_text(encoding="utf-8"))
    return template.render(score=score, scores=scores, against=against, trained=trained, ratio=_step_ratio, peak=peak)


def _step_ratio(method: str) -> str:
    """Step time over the frozen model's, median, from the kept benchmark of ranks."""
    methods: Mapping[str, Any] = json.loads(_RANKS.read_text())["methods"]
    return f"{methods[method]['ratio']['median']:.2f}"
