"""What an adapter changes by its file is what merging it changes, for every method; and what two models differ in."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from tests.tuners.models import build
from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import (
    adapter_changes,
    load_adapter,
    merged_changes,
    model_changes,
    original_weights,
    read_adapter,
    reads_without_base,
)
from turnrow.errors import UserError

METHODS = {
    "rows": RocoftConfig(indices=[4, 1], bias="rocoft_only"),
    "columns": RocoftConfig(mode="column", indices=[4, 1]),
    "both": RocoftConfig(mode="row+column", indices={"row": [4, 1], "column": [0, 3, 2]}),
    "entries": RocoftConfig(mode="entry", density=0.2, selection="random"),
    "road_1": RoadConfig(variant="road_1", group_size=4, target_modules="all-linear"),
    "road_4": RoadConfig(variant="road_4", group_size=2, target_modules="all-linear"),
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"),
    "rslora": LoraConfig(r=3, use_rslora=True, target_modules="all-linear"),
    "patterns": LoraConfig(
        r=3, target_modules=["query", "dense"], rank_pattern={"query": 2}, alpha_pattern={"output.dense": 7}
    ),
}
OF_BERT = ("patterns",)
"""Name modules of bert."""


def dense(delta):
    return delta if isinstance(delta, torch.Tensor) else delta[0] @ delta[1]


@pytest.fixture
def case(make_bert, make_llama, make_gpt2, train_a_little, save, tmp_path):
    """`case(kind, method)`: a new base model, and the folder of an adapter for it."""

    def case(kind, config):
        make = {"bert": make_bert, "llama": make_llama, "gpt2": make_gpt2}[kind]
        config = copy.deepcopy(config)
        config.task_type = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
        if kind == "llama" and config.peft_type == "ROCOFT":
            config.bias = "none"
        if kind == "gpt2" and config.peft_type == "LORA":
            config.fan_in_fan_out = True
        adapter = save(train_a_little(make(), config), tmp_path / "adapter")
        return make(), adapter

    return case


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, method)
        for kind in ("bert", "llama", "gpt2")
        for method in METHODS
        if kind == "bert" or method not in OF_BERT
    ],
)
def test_by_the_file_and_by_merging_it_is_the_same(kind, method, case):
    base, folder = case(kind, METHODS[method])
    adapter = read_adapter(folder)
    by_file = {change.name: change for change in adapter_changes(adapter, base)}
    model = load_adapter(base, folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = {change.name: change for change in merged_changes(model)}
    assert by_file.keys() == merged.keys()
    for name, change in merged.items():
        mine = by_file[name]
        torch.testing.assert_close(dense(mine.delta), dense(change.delta), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine.weight, change.weight)
        assert mine.shape == change.shape == tuple(change.weight.shape)
        assert (mine.blocks is not None) == (method.startswith("road") and not name.endswith("bias"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_without_the_base_it_is_the_same_but_for_what_only_the_base_says(method, case):
    base, folder = case("bert", METHODS[method])
    adapter = read_adapter(folder)
    assert reads_without_base(adapter)
    known = {change.name: change for change in adapter_changes(adapter, base)}
    for change in adapter_changes(adapter):
        assert change.weight is None
        assert change.shape == known[change.name].shape
        if method.startswith("road"):
            assert change.delta is None
            assert all(torch.equal(a, b) for a, b in zip(change.blocks, known[change.name].blocks, strict=True))
        else:
            assert torch.equal(dense(change.delta), dense(known[change.name].delta))


def test_golden_rows_without_a_manifest(write, golden_rows, golden_columns):
    first, second = adapter_changes(read_adapter(write(*golden_rows)))
    assert first.shape is None
    assert first.parts["row"].tolist() == [2, 0]
    assert dense(first.delta).tolist() == [[6, 7, 8, 9, 10, 11], [0] * 6, [0, 1, 2, 3, 4, 5]]
    assert dense(second.delta).tolist() == [[0] * 4, [1, 2, 2, 4]]
    (first,) = adapter_changes(read_adapter(write(*golden_columns, name="columns")))
    assert dense(first.delta)[:, 5].tolist() == [0, 2, 4, 6]


def test_golden_turn(write, golden_road, two_layers):
    config, tensors = golden_road
    tensors["base_model.model.first.road_theta"] = torch.tensor([torch.pi / 2, 0.0])
    weight, bias = adapter_changes(read_adapter(write(config, tensors)), two_layers)
    old = two_layers.first.weight
    expected = torch.stack((-old[1] - old[0], old[0] - old[1], old[2], old[3]))  # a quarter turn; twice
    torch.testing.assert_close(weight.delta, expected)
    torch.testing.assert_close(bias.delta[2:], two_layers.first.bias[2:])


def test_experts_are_weights_of_their_own(save, tmp_path):
    config = RocoftConfig(r=2, mode="row+column", task_type="CAUSAL_LM", init_weights=False)
    folder = save(get_peft_model(build("gpt_oss")[0], config), tmp_path / "adapter")
    adapter, base = read_adapter(folder), build("gpt_oss")[0]
    found = {change.name: change for change in adapter_changes(adapter, base)}
    experts = [name for name in found if "[" in name]
    assert "model.layers.0.mlp.experts.down_proj[3]" in experts
    model = load_adapter(base, folder)
    whole = {change.name: change.delta for change in merged_changes(model)}
    for name in experts:
        weight, _, expert = name.partition("[")
        layer = next(own for key, own in whole.items() if key.startswith(weight) and own.ndim == 3)
        expected = layer[int(expert[:-1])]
        mine = dense(found[name].delta)
        torch.testing.assert_close(mine, expected if mine.shape == expected.shape else expected.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, target_modules=["query"]),
        LoraConfig(r=2, init_lora_weights="olora", target_modules=["query"]),
        LoraConfig(r=2, alpha_pattern={"layer.[01].*query": 3}, target_modules=["query"]),
    ],
    ids=["dora", "a start that changes the base", "a pattern for peft to read"],
)
def test_what_the_file_does_not_say_alone_is_asked_of_the_base(case, config):
    base, folder = case("bert", config)
    adapter = read_adapter(folder)
    assert not reads_without_base(adapter)
    with pytest.raises(UserError, match="whose file does not say by itself what it changes: put it on its base"):
        adapter_changes(adapter, base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    originals = original_weights(adapter, base)
    # The fingerprint was taken of the base that the start had changed.
    model = load_adapter(base, folder, check_base=config.init_lora_weights is True)
    found = list(merged_changes(model, originals))
    merged = model.merge_and_unload().state_dict()
    for change in found:
        expected = merged[f"{change.name}.weight"] - before[f"{change.name}.weight"]
        torch.testing.assert_close(change.delta, expected, atol=1e-6, rtol=1e-5)
    assert [change.name.rpartition(".")[2] for change in found] == ["query", "query"]
    assert all(change.delta.abs().max() > 1e-3 for change in found)


def test_entries_need_to_know_how_large_the_weight_is(make_bert, train_a_little, save, tmp_path):
    config = RocoftConfig(mode="entry", density=0.1, target_modules=["query"], task_type="SEQ_CLS")
    folder = save(train_a_little(make_bert(), config), tmp_path / "adapter", manifest=False)
    with pytest.raises(
        UserError, match=r"no turnrow.json that says how large the weight of .* is: name the base model"
    ):
        list(adapter_changes(read_adapter(folder)))
    assert len(list(adapter_changes(read_adapter(folder), make_bert()))) == 2


@pytest.mark.parametrize("stripped", ["base", "tuned", "neither"])
def test_two_models_differ_in_what_was_changed(make_bert, tmp_path, stripped):
    base, tuned = make_bert(labels=2), make_bert(labels=3)
    tuned.load_state_dict({n: v for n, v in base.state_dict().items() if not n.startswith("classifier")}, strict=False)
    with torch.no_grad():
        tuned.bert.encoder.layer[1].output.dense.weight[2, 3] += 2
        tuned.bert.embeddings.LayerNorm.bias[0] -= 1
    (base.bert if stripped == "base" else base).save_pretrained(tmp_path / "base", max_shard_size="6KB")
    (tuned.bert if stripped == "tuned" else tuned).save_pretrained(tmp_path / "tuned")
    found = model_changes(tmp_path / "tuned", tmp_path / "base")
    changes = {change.name.removeprefix("bert."): change for change in found.changes}
    assert changes.keys() == {"encoder.layer.1.output.dense", "embeddings.LayerNorm.bias"}
    weight = changes["encoder.layer.1.output.dense"]
    assert weight.delta.nonzero().tolist() == [[2, 3]]
    assert weight.delta[2, 3].item() == pytest.approx(2)
    assert torch.equal(weight.weight, base.bert.encoder.layer[1].output.dense.weight)
    assert sorted(found.unmatched) == ([] if stripped == "tuned" else ["classifier.bias", "classifier.weight"])


def test_models_that_are_none_or_others_are_refused(make_bert, tmp_path):
    make_bert().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="'.*nothing' is no folder with the safetensors files of a model"):
        model_changes(tmp_path / "nothing", tmp_path / "base")
    (tmp_path / "other").mkdir()
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(UserError, match="have no tensor in common"):
        model_changes(tmp_path / "other", tmp_path / "base")
    assert not list(model_changes(tmp_path / "base", tmp_path / "base").changes)
