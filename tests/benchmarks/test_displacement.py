"""The pilot study's benchmark: a method is trained and measured, and table and plot are made of the result."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from benchmarks import displacement
from benchmarks.displacement import METHODS, main


@pytest.fixture
def data(tmp_path, tiny_tokenizer, monkeypatch):
    """Rows of sst2, and settings that name a tiny encoder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=80, **sizes)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    (tmp_path / "sst2").mkdir()
    rows = [{"sentence": text, "label": label} for text, label in (("a good film", 1), ("an awful story", 0))] * 8
    for split in ("train", "validation", "test"):
        with gzip.open(tmp_path / "sst2" / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "save_strategy": "no", "eval_strategy": "no"}
    recipe = {"model": str(tmp_path / "encoder"), "max_length": 16, "training": training}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    monkeypatch.setattr(displacement, "_SETTINGS", tmp_path / "settings.yaml")
    return tmp_path


def test_methods_are_trained_and_measured_and_shown(data, capsys) -> None:
    output, plot = data / "result.json", data / "plot.png"
    methods = ["full", "RoAd1"]
    assert main(["--data", str(data), "--methods", *methods, "--output", str(output), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out.strip().splitlines()[-4:]
    result = json.loads(output.read_text())
    assert list(result["methods"]) == methods
    for name in methods:
        found = result["methods"][name]
        assert found["learning_rate"] == METHODS[name][1]
        layers = found["displacement"]["layers"]
        assert found["displacement"]["texts"] == 16
        assert layers["layer 2"]["first"]["turn"]["count"] == 16
        assert layers["layer 2"]["first"]["turn"]["mean"] > 1e-9
    assert result["methods"]["RoAd1"]["displacement"]["layers"]["embeddings"]["all"]["turn"]["greatest"] < 1e-12
    assert printed[0].startswith("| | accuracy | layer 1, [CLS]: dM | dD | layer 1, words")
    assert [line.split(" | ")[0] for line in printed[2:]] == ["| full", "| RoAd1"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["--show", "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip().splitlines() == printed


def test_missing_data_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "name the folder that holds sst2/train.jsonl.gz" in capsys.readouterr().err
