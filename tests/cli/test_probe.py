from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from turnrow.cli.main import main

from ..training.conftest import films, tiny_base  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUICK = ["--shots", "3", "--draws", "1", "--rows", "5", "--no-steps"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, films: Path) -> str:  # noqa: F811
    values = {
        "model": str(tiny_base),
        "task": {"name": "classification", "text": ["sentence"]},
        "data": {"folder": str(films)},
        "method": {"name": "rocoft", "r": 1},
        "training": {"use_cpu": True},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "recipe.yaml")


def test_table_and_page(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "probe.html"
    candidates = ["--candidate", "{name: rocoft, r: 2}", "--candidate", "{name: bitfit}"]
    assert main(["probe", "--config", recipe, *candidates, *QUICK, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "rocoft row r=2" in shown
    assert "bitfit" in shown
    assert "nothing was trained" in shown
    assert page.is_file()
    assert not (tmp_path / "run").exists()


def test_json(recipe: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["probe", "--config", recipe, "--candidate", "{name: rocoft}", *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"][0]["title"] == "rocoft row r=3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidate", "rocoft"], "--candidate is 'rocoft'; expected the method of a recipe"),
        (["--candidate", "{name: rocoft, r: 0}"], "r is 0"),
        (["--html", "."], "--html '.' is a folder"),
        (["--shots", "0"], "shots is 0"),
    ],
)
def test_bad_input_is_named(recipe: str, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main(["probe", "--config", recipe, *QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err
