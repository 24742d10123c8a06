"""`turnrow merge` writes a plain transformers model, with its tokenizer, and says how much changed."""

from __future__ import annotations

import os
import re

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from turnrow import RocoftConfig
from turnrow.adapters import write_manifest
from turnrow.cli.main import main


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=80, **sizes)).eval()


@pytest.fixture
def model(tmp_path, tiny_tokenizer):
    """A trained model; `base`, `other` (another base) and `adapter` lie in tmp_path."""
    bert(0).save_pretrained(tmp_path / "base")
    bert(1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(model, RocoftConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    model.save_pretrained(tmp_path / "adapter")
    write_manifest(tmp_path / "adapter", model)
    return model


@pytest.mark.parametrize("named", [True, False])
def test_merged_model_computes_the_same(model, tmp_path, capsys, named):
    base = ["--base", str(tmp_path / "base")] if named else []
    assert main(["merge", *base, "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat sat", return_tensors="pt")
    torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits)
    out = capsys.readouterr().out
    assert re.search(r"norm of the change 2\.82843, [\d.]+% of the changed weights", out)  # 32 values of 0.5
    assert "taken whole from the adapter: classifier.bias, classifier.weight" in out


def test_another_base_is_refused_unless_told_otherwise(model, tmp_path, capsys):
    arguments = ["merge", "--base", str(tmp_path / "other"), "--adapter", str(tmp_path / "adapter"), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "the first module that differs is 'bert.encoder.layer.0.attention.self.query'" in error
    assert "--no-check-base" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, str(tmp_path / "out"), "--no-check-base"]) == 0
    assert "no tokenizer was found" in capsys.readouterr().out


def test_full_out_folder_is_refused(model, tmp_path, capsys):
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    before = sorted(os.listdir(base))
    assert main(["merge", "--adapter", adapter, "--out", base]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(os.listdir(base)) == before


def test_adapter_without_base_asks_for_one(model, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    (adapter / "turnrow.json").unlink()
    config = adapter / "adapter_config.json"
    config.write_text(
        re.sub(r'"base_model_name_or_path": "[^"]*"', '"base_model_name_or_path": null', config.read_text())
    )
    assert main(["merge", "--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 2
    assert "does not name its base model: give --base MODEL" in capsys.readouterr().err
