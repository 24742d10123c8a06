"""What a step of each method costs: every method, one with sparse tensors too, beside the frozen model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.suite.cost import measure_costs, read_costs
from benchmarks.suite.suite import Suite
from benchmarks.suite.tables import cost_table

METHODS = {
    "full": {"method": {"name": "full"}},
    "rows": {"method": {"name": "rocoft", "mode": "row", "r": 2, "selection": "gradient"}},
    "sparse": {"method": {"name": "shira", "r": 1, "random_seed": 0, "target_modules": ["query", "value"]}},
    "tokens": {"method": {"name": "prefix_tuning", "num_virtual_tokens": 4}},
}
BATCH, SEQUENCE = 2, 5
CONFIG = BertConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
)


@pytest.fixture
def suite(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Suite:
    folder = tmp_path / "base"
    BertModel(CONFIG).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    raw = {
        "settings": "toy",
        "recipe": {"model": str(folder)},
        "training_rows": 10,
        "seeds": [0],
        "learning_rates": {"grid": [1e-3], "first": [1e-3]},
        "step": {"batch": BATCH, "sequence": SEQUENCE},
        "tasks": {"sst2": {}},
    }
    return Suite("toy", "Toy", ("sst2",), {"all": METHODS}, raw)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_every_method_is_measured_against_the_frozen_model(suite: Suite, tmp_path: Path) -> None:
    path = measure_costs(suite, rounds=2, root=tmp_path)
    written = json.loads(path.read_text())
    assert path.name == "toy-cpu.json"
    assert written["settings"] == {
        "device": "cpu",
        "dtype": "float32",
        "batch": BATCH,
        "sequence": SEQUENCE,
        "rounds": 2,
    }
    measured = read_costs("toy", root=tmp_path)
    assert measured is not None
    costs = measured.methods
    assert [cost["title"] for cost in costs.values()] == [*METHODS, "the limit: frozen model"]
    assert costs["frozen"]["ratio"]["median"] == 1.0
    assert all(cost["seconds"]["median"] > 0 for cost in costs.values())
    slug = {name: suite.cell("sst2", fields).slug for name, fields in METHODS.items()}
    weights = sum(weight.nbytes for weight in BertModel(CONFIG).parameters())
    assert costs[slug["full"]]["peak_bytes"] > weights, "there is a gradient of every weight at the end"
    assert costs["frozen"]["peak_bytes"] < costs[slug["rows"]]["peak_bytes"] < costs[slug["full"]]["peak_bytes"]
    table = cost_table(suite, tmp_path)
    assert f"A step on {BATCH} rows of {SEQUENCE} tokens, float32" in table
    assert table.count("\n| ") == 1 + len(METHODS) + 1
    assert "| the limit: frozen model | 1.00 | 1.00 to 1.00 |" in table


def test_what_was_not_measured_has_no_table(suite: Suite, tmp_path: Path) -> None:
    assert cost_table(suite, tmp_path) == ""


def test_the_shape_and_the_dtype_can_be_chosen(suite: Suite, tmp_path: Path) -> None:
    small = json.loads(measure_costs(suite, rounds=1, root=tmp_path).read_text())
    large = json.loads(measure_costs(suite, rounds=1, batch=4, dtype="bfloat16", root=tmp_path).read_text())
    assert (large["settings"]["batch"], large["settings"]["dtype"]) == (4, "bfloat16")
    assert small["methods"]["frozen"]["peak_bytes"] != large["methods"]["frozen"]["peak_bytes"]
