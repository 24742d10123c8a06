from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from turnrow.cli.main import main


@pytest.fixture
def recipe(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": f"the film was {word}", "label": word} for word in ("good", "bad")] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": str(tmp_path / "base"),
        "task": {"name": "classification", "text": ["text"], "label": "label"},
        "data": {"train": "rows.jsonl", "test": "rows.jsonl"},
        "method": {"name": "rocoft", "r": 2, "selection": "gradient"},
        "training": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "recipe.yaml")


def test_the_file_is_written_shown_and_trained_with(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "indices.json"
    assert main(["select", "--config", recipe, "--out", str(out), "--samples", "6", "--method.mode", "column"]) == 0
    captured = capsys.readouterr()
    assert "selected by gradient on 6 of 8 training rows" in captured.err
    held = json.loads(out.read_text())
    assert {name: held[name] for name in ("version", "mode", "strategy")} == {
        "version": 1,
        "mode": "column",
        "strategy": "gradient",
    }
    name = "bert.encoder.layer.0.intermediate.dense"
    (shown,) = (line for line in captured.out.splitlines() if name in line)
    numbers = " ".join(map(str, held["modules"][name]))
    assert re.search(rf"24 x 16 +column {numbers} +[\d.]+ % *$", shown)
    assert captured.out.splitlines()[-1] == f"wrote {out}: column by gradient in {len(held['modules'])} modules"

    method = f"{{name: rocoft, mode: column, indices: {out}}}"
    assert main(["train", "--config", recipe, "--method", method]) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["indices"] == held["modules"]


def test_a_file_that_exists_is_replaced_only_when_told(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "indices.json"
    out.write_text("mine")
    command = ["select", "--config", recipe, "--out", str(out), "--method.selection", "random"]
    assert main(command) == 2
    assert "indices.json exists already; replace it by --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(out.read_text())["strategy"] == "random"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp_path}"], "is a folder; give the path of a file"),
        (["--out", "x.json", "--samples", "0"], "--samples is 0; give the number of training rows"),
        (["--out", "x.json", "--method.selection", "gradiant"], "did you mean 'gradient'"),
        (["--out", "x.json", "--method", "{{name: head}}"], "method 'head' trains no rows or columns"),
    ],
)
def test_bad_arguments_are_refused(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["select", "--config", recipe, *(word.format(tmp_path=tmp_path) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x.json").exists()
