from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from turnrow.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    logger = logging.getLogger("turnrow")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def recipe(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"first": f"the film was {word}", "second": "a story", "label": word} for word in ("good", "bad")] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": str(tmp_path / "base"),
        "task": {"name": "classification", "text": ["first", "second"], "label": "label"},
        "data": {"train": "rows.jsonl", "test": "rows.jsonl"},
        "method": {"name": "rocoft", "r": 1},
        "training": {"max_steps": 2, "use_cpu": True},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_train_evaluate_and_predict_from_the_command_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(recipe), "--method.r", "2", "--training.learning_rate=1e-2"]) == 0
    shown = capsys.readouterr().out
    assert "rocoft: test metric" in shown
    assert "2 steps" in shown
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    adapter, data = str(tmp_path / "run" / "adapter"), str(tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2

    output = tmp_path / "figures.json"
    assert main(["evaluate", "--adapter", adapter, "--data", data, "--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text()) == metrics["after"]

    assert main(["predict", "--adapter", adapter, "--data", data]) == 0
    assert capsys.readouterr().out == (tmp_path / "run" / "predictions.jsonl").read_text()
    assert main(["predict", "--adapter", adapter, "--text", "a good film", "--text", "a story"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["first"], row["prediction"] in ("good", "bad")) == ("a good film", True)

    assert main(["predict", "--adapter", adapter, "--text", "a good film"]) == 2
    assert "--text was given 1 times; this adapter's task reads first, second" in capsys.readouterr().err
    assert main(["train", "--config", str(recipe)]) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert main(["train", "--config", str(recipe), "--overwrite"]) == 0
    assert main(["train", "--config", str(recipe), "--resume"]) == 0
    assert f"the run in {tmp_path / 'run'} is finished already" in capsys.readouterr().err


def test_an_unknown_field_is_answered_with_near_ones(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(recipe), "--trainig.max_steps", "1"]) == 2
    assert "no field 'trainig'; did you mean 'training'" in capsys.readouterr().err


def test_the_fields_of_a_recipe_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", "x", "--help-recipe"])
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Storage type of the frozen base weights" in printed
    assert "--data.validation" in printed


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("place", "message"),
    [(".", "is a folder; give the path of a file in it"), ("file/x", "which is a file; give another path")],
)
def test_where_nothing_can_be_written_is_refused_before_the_work(
    command: str, place: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([command, "--adapter", "no_adapter", "--data", "no.jsonl", "--output", str(tmp_path / place)]) == 2
    assert message in capsys.readouterr().err
