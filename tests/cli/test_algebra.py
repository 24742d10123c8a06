"""The commands that combine adapters, from the shell's side."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from turnrow import RocoftConfig
from turnrow.adapters import write_manifest
from turnrow.cli.main import main


@pytest.fixture
def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=40, **sizes))


@pytest.fixture
def folders(base, tmp_path):
    """Two adapters, on rows 0 and 2 and on rows 2 and 5, with one classifier."""
    for name, rows in (("a", [0, 2]), ("b", [2, 5])):
        torch.manual_seed(len(rows) + rows[0])
        model = get_peft_model(base, RocoftConfig(indices=rows, task_type="SEQ_CLS", init_weights=False))
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        write_manifest(tmp_path / name, model)
        base = model.unload()
    return str(tmp_path / "a"), str(tmp_path / "b")


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_commands_from_two_adapters_and_back(folders, tmp_path, capsys):
    a, b = folders
    status, out, _ = run(capsys, "compose", a, b, "--weights", "1", "-1", "--out", str(tmp_path / "both"))
    assert status == 0
    assert "ROCOFT adapter of 7 modules, and classifier.bias, classifier.weight whole" in out
    assert "changed by more than one of the adapters, in 7 modules:\n" in out
    assert "  bert.encoder.layer.0.attention.self.query: row 2\n" in out
    assert "  and 2 more" in out
    status, out, _ = run(capsys, "scale", b, "--by", "-1", "--out", str(tmp_path / "minus"))
    assert (status, "modules:" in out) == (0, False)
    assert run(capsys, "subtract", a, b, "--out", str(tmp_path / "difference"))[0] == 0
    assert (
        run(capsys, "interpolate", a, b, "--at", "0.5", "--no-saved-modules", "--out", str(tmp_path / "half"))[0] == 0
    )
    both, difference, minus, half = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("both", "difference", "minus", "half")
    )
    assert all(torch.equal(both[key], difference[key]) for key in both)
    assert not any("classifier" in key for key in half)
    key = "base_model.model.bert.encoder.layer.0.output.dense.rocoft_row"
    assert torch.equal(minus[key], -load_file(f"{b}/adapter_model.safetensors")[key])
    assert json.loads((tmp_path / "half" / "turnrow.json").read_text())["provenance"]["t"] == 0.5


def test_wrong_input_ends_with_one_line(folders, tmp_path, capsys):
    a, _ = folders
    status, out, err = run(capsys, "compose", a, "--out", str(tmp_path / "both"))
    assert (status, out) == (2, "")
    assert err.startswith("error: compose takes two or more adapters")
    status, _, err = run(capsys, "compose", a, str(tmp_path / "nowhere"), "--out", str(tmp_path / "both"))
    assert status == 2
    assert "no adapter folder" in err
    assert not (tmp_path / "both").exists()


def test_extract_from_two_models_on_disk(base, tmp_path, capsys):
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.bert.encoder.layer[0].output.dense.weight[3] += 1
        base.bert.embeddings.LayerNorm.weight += 1
    base.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "task.json").write_text("{}")
    models = "--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned")
    status, out, _ = run(capsys, "extract", *models, "--task", "SEQ_CLS", "--out", str(tmp_path / "adapter"))
    assert status == 0
    assert "ROCOFT adapter of 1 modules, which leaves out 0.00% of the change" in out
    assert (
        "1 parameters changed that the adapter does not hold, most of all bert.embeddings.LayerNorm.weight (4)" in out
    )
    # the task comes along, the configuration of the model does not, and the base keeps the name it was given
    names = {entry.name for entry in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "turnrow.json", "task.json"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    status, _, err = run(capsys, "extract", *models, "--task", "SEQ_CLF", "--out", str(tmp_path / "other"))
    assert status == 2
    assert "did you mean 'SEQ_CLS'" in err
