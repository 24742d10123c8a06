from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from turnrow.training import train
from turnrow.training.curve import draw_curve
from turnrow.training.report import write_report

from .conftest import MakeRecipe

METRICS: dict[str, Any] = {
    "model": "some/model",
    "task": "classification",
    "method": "rocoft",
    "main_metric": "accuracy",
    "before": {"accuracy": 0.5},
    "after": {"accuracy": 0.9},
    "trainable_parameters": 1234,
    "total_parameters": 123400,
    "steps": 8,
    "epochs": 2.0,
    "checkpoint_step": 8,
    "seconds_per_step": None,
    "peak_memory_bytes": 3 * 2**30,
    "peak_memory_kind": "peak resident set of the process",
    "rows": {"train": 24, "test": 2},
    "device": "cpu",
    "versions": {"turnrow": "0.1.0"},
    "seed": 0,
}
ROWS = [
    {"sentence": "fine", "label": 1, "prediction": 1, "probability": 0.75},
    {"sentence": "<script>alert(1)</script>", "label": "0", "prediction": 1, "probability": 0.5},
]


@pytest.fixture
def page(tmp_path: Path, make_recipe: MakeRecipe) -> str:
    draw_curve(tmp_path / "curve.png", [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}], METRICS)
    write_report(tmp_path / "report.html", tmp_path / "curve.png", make_recipe(), METRICS, ROWS)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(page: str) -> None:
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
    assert not re.search(r"https?://|<script|<link|@import", page)


def test_text_of_the_data_is_text_on_the_page(page: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_shows_the_figures(page: str) -> None:
    for shown in ("0.9000", "0.5000 before", "1,234", "1 % of 123,400", "3.00 GiB", "1 of 2 wrong", "name: rocoft"):
        assert shown in page, shown


def test_mistakes_come_first(page: str) -> None:
    assert page.index("alert(1)") < page.index(">fine<")


def test_a_run_without_validation_and_log_still_has_a_picture(tmp_path: Path) -> None:
    draw_curve(tmp_path / "curve.png", [], METRICS)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_pages_of_a_run_are_written(make_recipe: MakeRecipe) -> None:
    folder = train(make_recipe(training={"max_steps": 1})).folder
    assert folder.curve.read_bytes().startswith(b"\x89PNG")
    assert "rocoft on classification" in folder.report.read_text(encoding="utf-8")
