"""Tables and plots, from files of runs and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suite.__main__ import main
from benchmarks.suite.plots import plot_task
from benchmarks.suite.store import Store
from benchmarks.suite.suite import Suite, load_suite
from benchmarks.suite.summary import percent
from benchmarks.suite.tables import overview, task_tables

RAW = {
    "settings": "toy",
    "recipe": {},
    "training_rows": 10,
    "seeds": [0, 1, 2],
    "learning_rates": {"grid": [1e-3], "first": [1e-3]},
    "tasks": {"sst2": {}, "rte": {}, "mr": {}},
}
SUITE = Suite(
    "toy",
    "Toy",
    ("sst2", "rte", "mr"),
    {
        "ours": {"rows": {"method": {"name": "rocoft"}}, "turns": {"method": {"name": "road"}}},
        "theirs": {"low rank": {"method": {"name": "lora"}}},
    },
    RAW,
)


def add(root: Path, group: str, name: str, task: str, scores: list[float], trained: int = 1000) -> None:
    store = Store(SUITE.cell(task, SUITE.groups[group][name]), root)
    for seed, score in enumerate(scores):
        store.add(
            {
                "learning_rate": 1e-3,
                "seed": seed,
                "main_metric": "accuracy",
                "greater_is_better": True,
                "validation": {"accuracy": 0.0},
                "test": {"accuracy": score},
                "trainable_parameters": trained,
                "seconds_per_step": 0.25,
                "peak_memory_bytes": 3 * 2**20,
            }
        )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    add(tmp_path, "ours", "rows", "sst2", [0.8, 0.81, 0.82])
    add(tmp_path, "ours", "rows", "rte", [0.6, 0.6, 0.6], trained=900)  # a smaller head
    add(tmp_path, "theirs", "low rank", "sst2", [0.9, 0.7], trained=2_000)
    return tmp_path


def test_the_overview_has_what_is_known_and_no_mean_where_a_task_is_missing(runs: Path) -> None:
    assert overview(SUITE, runs).splitlines() == [
        "| | trained | sst2 | rte | mean |",
        "|---|--:|--:|--:|--:|",
        "| rows | 1,000 | 81.0 ± 1.0 | 60.0 ± 0.0 | 70.5 |",
        "| low rank | 2,000 | 80.0 ± 14.1 (2) |  |  |",
    ]


def test_a_task_has_a_table_a_group(runs: Path) -> None:
    tables = dict(task_tables(SUITE, "sst2", root=runs))
    assert list(tables) == ["ours", "theirs"]
    assert tables["ours"].splitlines()[2:] == ["| rows | 1,000 | 81.0 ± 1.0 | 3 | 0.001 |  |  |"]
    assert dict(task_tables(SUITE, "mr", root=runs)) == {}


def test_shares_are_percentages_and_perplexities_are_not() -> None:
    assert (percent("accuracy", 0.5), percent("perplexity", 7.5)) == (50.0, 7.5)


def test_a_plot_is_drawn_of_a_task_of_which_something_is_known(runs: Path) -> None:
    target = runs / "plots" / "sst2.png"
    assert plot_task(SUITE, "sst2", target, runs)
    assert target.read_bytes()[:4] == b"\x89PNG"
    assert not plot_task(SUITE, "mr", runs / "mr.png", runs)
    assert not (runs / "mr.png").exists()


def test_the_command_shows_the_kept_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "minilm"]) == 0
    printed = capsys.readouterr().out
    assert load_suite("minilm").title in printed
    assert "| RoAd1 | 21,890 |" in printed
    assert main(["show", "minilm", "--tasks", "sst3"]) == 2
    assert "suite 'minilm' has no task 'sst3'" in capsys.readouterr().err
