"""The disentanglement benchmark: its scores, and that table and plot are made of the result."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import disentanglement
from benchmarks.disentanglement import HEADS, POOLINGS, main, score_of


def test_scores_by_hand() -> None:
    right = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 1]])
    labels = torch.tensor([1, 0, 1, 0])
    assert score_of("rte", right, labels) == 0.75
    assert score_of("cola", right, labels) == pytest.approx(0.577350)  # (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1)
    assert score_of("stsb", torch.tensor([[1.0], [2], [3]]), torch.tensor([2.0, 4, 6])) == pytest.approx(1)
    assert score_of("stsb", torch.ones(3, 1), torch.tensor([2.0, 4, 6])) == 0


@pytest.fixture
def data(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / "rte").mkdir(exist_ok=True)
        rows = [
            {"sentence1": "the cat sat" + " on" * (i % 4), "sentence2": "a dog ran", "label": i % 2} for i in range(12)
        ]
        with gzip.open(tmp_path / "rte" / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def encoder(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=80, **sizes)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_states_stand_in_the_order_of_the_rows(data, encoder, tiny_tokenizer) -> None:
    model = disentanglement.backbone("pretrained", str(encoder))
    rows = disentanglement.read_rows(data, "rte", 100)["test"]
    found = disentanglement.states_of(model, tiny_tokenizer, rows, batch=5)["first"]
    assert found.labels.tolist() == [0, 1] * 6
    inputs = tiny_tokenizer(rows[3]["sentence1"], rows[3]["sentence2"], return_tensors="pt")
    torch.testing.assert_close(found.states[3], model(**inputs).last_hidden_state[0, 0])


def test_table_and_plot_are_made_of_the_result_and_nothing_is_run_twice(data, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disentanglement, "RATES", (1e-3, 1e-2))
    output = tmp_path / "result.json"
    arguments = ["--data", str(data), "--tasks", "rte", "--model", str(encoder), "--epochs", "1"]
    assert main([*arguments, "--output", str(output), "--plot", str(tmp_path / "plot.svg")]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["sizes"] == {"rte": {"train": 12, "validation": 12, "test": 12}}
    for pooling in POOLINGS:
        found = result["scores"]["rte"][pooling]
        assert found.keys() == HEADS.keys()
        assert all(list(one["test"]) == ["0", "1", "2"] for one in found.values())
    assert result["constant"] == {"rte": 0.5}
    assert "| a constant | 50.0 |" in printed
    assert (tmp_path / "plot.svg").stat().st_size > 10_000
    monkeypatch.setattr(disentanglement, "disentangle", None)
    assert main([*arguments, "--output", str(output)]) == 0
    assert capsys.readouterr().out == printed
    assert main(["--show", "--output", str(output)]) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="holds another setting"):
        main([*arguments[:-1], "2", "--output", str(output)])


def test_missing_data_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--tasks", "rte"])
    assert "name the folder that holds rte/train.jsonl.gz" in capsys.readouterr().err
