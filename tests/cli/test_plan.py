from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import LlamaConfig

from turnrow.cli.main import main
from turnrow.cli.plan import _show
from turnrow.training import Recipe, plan


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose model is a config alone and whose data are not there."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaConfig(vocab_size=40, **sizes).save_pretrained(tmp_path / "llama")
    values = {
        "model": str(tmp_path / "llama"),
        "task": {"name": "classification", "text": "text"},
        "data": {"train": "rows.jsonl", "test": "rows.jsonl"},
        "method": {"name": "rocoft", "r": 1},
        "training": {"use_cpu": True},
        "max_length": 8,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forecast of the recipe's method and full fine-tuning alone: that of every method takes long."""
    monkeypatch.setattr(
        "turnrow.training.planning.forecast.candidates", lambda method: [dict(method), {"name": "full"}]
    )


def test_the_table_has_a_row_a_method_and_says_what_is_left_out(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--config", str(recipe), "--batch", "2", "4", "--memory", "1KB", "--method.r", "2"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if line.split()[:1] == ["method"])
    assert all(name in header for name in ("trained", "saved x2", "peak x2", "saved x4", "peak x4", "fits 1KB"))
    for title in ("rocoft row r=2", "rocoft column r=2", "road road_1", "lora r=8", "full"):
        assert any(line.strip().startswith(title) for line in shown.splitlines()), title
    assert "assumed: 2 labels" in shown
    assert "not in the forecast: the process and its libraries" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("few_methods")
def test_a_narrow_screen_gets_two_tables_and_whole_figures(recipe: Path) -> None:
    planned = plan(
        Recipe.from_yaml(recipe), batches=[2, 4], memory=10**3
    )  # none fits, so no long search for the largest that does
    narrow = Console(width=90, record=True, highlight=False, markup=False, file=StringIO())
    _show(planned, narrow, "1KB")
    heads = [line.split() for line in narrow.export_text().splitlines() if line.split()[:1] == ["method"]]
    assert heads == [
        ["method", "trained", "base", "adapter", "gradients", "optimizer"],
        ["method", "saved", "x2", "peak", "x2", "saved", "x4", "peak", "x4", "fits", "1KB"],
    ]


@pytest.mark.usefixtures("few_methods")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--quantization", "nf4"], "base weights in float32, quantized by nf4 (full: float32), adamw"),
        (["--training.bf16", "true"], "base weights in float32 (full: float32), autocast to bfloat16, adamw"),
    ],
)
def test_the_head_says_what_is_computed(
    recipe: Path, changes: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(recipe), "--batch", "1", *changes]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.usefixtures("few_methods")
def test_json_is_the_whole_plan(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(recipe), "--batch", "3", "--sequence", "5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["version"], printed["sequence"], printed["memory"]) == (1, 5, None)
    assert [batch["batch"] for batch in printed["methods"][0]["batches"]] == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch is 0; expected a whole number, 1 or more"),
        (["--batch", "-1"], "batch is -1"),
        (["--sequence", "0"], "sequence is 0"),
        (["--memory", "much"], "memory is 'much'; expected a size such as 24GB"),
        (["--model", "some/model"], "model 'some/model' cannot be loaded"),
        (["--methd.r", "1"], "no field 'methd'; did you mean 'method'"),
    ],
)
def test_bad_input_is_said_in_a_line(
    recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(recipe), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
