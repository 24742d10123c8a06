"""Two tasks in one model: who is trained on what, and what the table is made of."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks import composability, two_tasks
from benchmarks.suite.search import best_rate
from benchmarks.two_tasks import KINDS, SETUPS, Rows, run_seed, search_rate


class Tokenizer:
    """Words by their lengths."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        rows = [torch.tensor([len(word) for word in text.split()]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def encoder() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=20, max_position_embeddings=20, **sizes), add_pooling_layer=False)


@pytest.fixture
def data() -> dict[str, dict[str, Rows]]:
    rows = Rows(["a bb ccc", "dd e", "ffff g hh", "i"] * 10, torch.tensor([0, 1, 0, 1] * 10))
    three = Rows(rows.texts, torch.tensor([0, 1, 2, 1] * 10))
    splits = ("train", "validation", "test")
    return {"first": dict.fromkeys(splits, rows), "second": dict.fromkeys(splits, three)}


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_every_kind_is_trained_and_evaluated(setup, encoder, data, monkeypatch) -> None:
    monkeypatch.setattr(two_tasks, "EPOCHS", 1)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = run_seed(setup, encoder, Tokenizer(), data, 1e-2, seed=0)
    kinds = [kind for kind in KINDS if setup.has_parts or "hal" not in kind]
    assert list(found) == kinds
    assert all(scores.keys() == data.keys() for scores in found.values())
    assert all(0 <= score <= 1 for scores in found.values() for score in scores.values())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_training_one_task_leaves_the_other_alone(encoder, data, monkeypatch) -> None:
    monkeypatch.setattr(two_tasks, "EPOCHS", 1)
    model = two_tasks._fresh(SETUPS[0], encoder, Tokenizer(), data, {"first": ":50%", "second": "50%:"}, seed=0)
    model.encoder.set_adapter("first")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    two_tasks._train(model, {"first": data["first"]["train"]}, 1e-2, seed=0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert all("first" in name for name in changed)
    assert any("road_theta" in name for name in changed)
    assert "heads.first.weight" in changed


def test_batches_alternate_and_hold_every_row_once(data) -> None:
    generator = torch.Generator().manual_seed(0)
    splits = {task: SimpleNamespace(texts=list("abcdefghij") * 7, labels=torch.arange(70)) for task in data}
    batches = list(two_tasks._batches(splits, generator))
    assert [task for task, *_ in batches] == ["first", "second"] * 3
    for task in data:
        assert sorted(int(n) for name, _, labels in batches if name == task for n in labels) == list(range(70))


def test_the_search_goes_on_beyond_its_edges(encoder, data, monkeypatch) -> None:
    monkeypatch.setattr(two_tasks, "_train", lambda model, splits, rate, seed: setattr(model, "rate", rate))
    monkeypatch.setattr(two_tasks, "_accuracy", lambda model, task, rows: min(model.rate, 3e-2))
    found = search_rate(SETUPS[0], encoder, Tokenizer(), data)
    assert list(found) == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert best_rate(found) == 3e-2


def test_the_table_and_the_plot_are_made_of_what_is_there(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(composability, "_RESULTS", tmp_path)
    seeds = {str(seed): {kind: {"sst2": 0.8 + seed / 100, "trec": 0.9} for kind in KINDS} for seed in range(3)}
    result = {"setup": SETUPS[0].name, "tasks": ["sst2", "trec"], "seeds": seeds}
    composability._path(SETUPS[0], ["sst2", "trec"]).write_text(json.dumps(result))
    assert composability.main(["--show"]) == 0
    printed = capsys.readouterr().out
    assert "| RoAd1, sst2 | 81.0 ± 1.0 |" in printed
    assert "| RoAd1, trec | 90.0 ± 0.0 |" in printed
    assert (tmp_path / "sst2-trec.png").stat().st_size > 1000
