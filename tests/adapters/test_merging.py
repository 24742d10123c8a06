"""A merged model is a plain transformers model that computes what base and adapter did."""

from __future__ import annotations

import math
import os

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import (
    load_adapter,
    load_base,
    load_processor,
    merge_adapter,
    read_adapter,
    skeleton,
)
from turnrow.errors import UserError

TARGETS = ["query", "value"]
CONFIGS = {
    "row": RocoftConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", bias="all"),
    "column": RocoftConfig(r=2, mode="column", target_modules=TARGETS, task_type="SEQ_CLS"),
    "road": RoadConfig(variant="road_2", group_size=4, target_modules=TARGETS, task_type="SEQ_CLS"),
    "lora": LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", init_lora_weights=False),
}


@pytest.fixture
def rows(tmp_path, make_bert, train_a_little, save):
    return save(train_a_little(make_bert(), CONFIGS["row"]), tmp_path / "adapter")


@pytest.mark.parametrize("method", CONFIGS)
def test_merged_equals_unmerged(tmp_path, make_bert, train_a_little, logits, method, save):
    model = train_a_little(make_bert(), CONFIGS[method])
    expected = logits(model)
    result = merge_adapter(make_bert(), save(model, tmp_path / "adapter"), tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-6)
    assert result.path == tmp_path / "out"
    assert result.replaced == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("method", ["row", "column"])
def test_merged_weights_are_bit_for_bit_the_trained_ones_in_bfloat16(
    tmp_path, make_bert, train_a_little, logits, method, save
):
    model = train_a_little(make_bert().bfloat16(), CONFIGS[method])
    expected = logits(model)
    merge_adapter(make_bert().bfloat16(), save(model, tmp_path / "adapter"), tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    reloaded = load_adapter(make_bert().bfloat16(), tmp_path / "adapter")
    assert torch.equal(logits(merged), logits(reloaded))
    assert expected.shape == logits(merged).shape


def test_the_change_is_measured_module_by_module(write, golden_rows, two_layers, tmp_path):
    norms = {
        name: math.hypot(*(parameter.norm().item() for parameter in module.parameters()))
        for name, module in two_layers.named_children()
    }
    two_layers.save_pretrained = lambda folder: (folder / "saved").touch()
    result = merge_adapter(two_layers, write(*golden_rows), tmp_path / "out")
    assert result.changes["first"] == pytest.approx((math.sqrt(506), norms["first"]))
    assert result.changes["second"] == pytest.approx((5.0, norms["second"]))
    assert result.change_norm == pytest.approx(math.sqrt(506 + 25))
    assert result.relative_change == pytest.approx(result.change_norm / math.hypot(*norms.values()))


def test_nothing_of_peft_is_left(rows, tmp_path, make_bert):
    model = make_bert()
    merge_adapter(model, rows, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert not any("rocoft" in name for name in model.state_dict())
    assert not hasattr(model, "peft_config")


def test_a_head_without_targets_merges_too(tmp_path, make_bert, logits, train_a_little, save):
    """How an adapter of a head alone is saved: an adapter that targets nothing, and modules_to_save."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    model = train_a_little(make_bert(), LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type="SEQ_CLS"))
    result = merge_adapter(make_bert(), save(model, tmp_path / "adapter"), tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(merged), logits(model))
    assert (result.changes, result.change_norm, result.relative_change) == ({}, 0, 0)


def test_tokenizer_is_saved_beside(rows, tmp_path, make_bert, tiny_tokenizer):
    merge_adapter(make_bert(), rows, tmp_path / "out", processor=tiny_tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat").input_ids == tiny_tokenizer("the cat").input_ids


def test_another_base_is_refused_and_nothing_written(rows, tmp_path, make_bert):
    with pytest.raises(UserError, match="belongs to another base"):
        merge_adapter(make_bert(seed=9), rows, tmp_path / "out")
    assert os.listdir(tmp_path) == ["adapter"]
    merge_adapter(make_bert(seed=9), rows, tmp_path / "out", check_base=False)


def test_full_out_folder_is_refused_before_the_model_is_touched(rows, tmp_path, make_bert):
    model = make_bert()
    with pytest.raises(UserError, match="is not empty"):
        merge_adapter(model, rows, rows)
    assert "rocoft" not in str(model)


def test_overflow_in_the_base_s_dtype_is_named(write, golden_rows, two_layers, tmp_path):
    config, tensors = golden_rows
    tensors["base_model.model.second.rocoft_row"] *= 1e6
    with pytest.raises(UserError, match="merging gives NaN or infinite values in 'second'"):
        merge_adapter(two_layers.half(), write(config, tensors), tmp_path / "out")
    assert os.listdir(tmp_path) == ["adapter"]


# --- the base for an adapter --------------------------------------------------------------------------------------


def test_base_gets_the_labels_of_the_adapter(tmp_path, make_bert, train_a_little, save):
    model = make_bert(labels=3)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    folder = save(train_a_little(model, CONFIGS["row"]), tmp_path / "adapter")
    make_bert(labels=2).save_pretrained(tmp_path / "base")
    base = load_base(read_adapter(folder), str(tmp_path / "base"))
    assert base.config.id2label == {0: "a", 1: "b", 2: "c"}
    load_adapter(base, folder, check_base=False)


def test_without_manifest_the_number_of_labels_comes_from_the_classifier(tmp_path, make_bert, train_a_little, save):
    save(train_a_little(make_bert(labels=3), CONFIGS["row"]), tmp_path / "adapter", manifest=False)
    make_bert(labels=2).save_pretrained(tmp_path / "base")
    assert load_base(read_adapter(tmp_path / "adapter"), str(tmp_path / "base")).config.num_labels == 3


def test_base_keeps_the_dtype_of_its_checkpoint(tmp_path, make_llama, train_a_little, save):
    make_llama().bfloat16().save_pretrained(tmp_path / "base")
    folder = save(train_a_little(make_llama(), RocoftConfig(task_type="CAUSAL_LM")), tmp_path / "adapter")
    base = load_base(read_adapter(folder), str(tmp_path / "base"))
    assert base.dtype == torch.bfloat16
    merge_adapter(base, folder, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_class_comes_from_task_type_then_auto_mapping_then_the_base(tmp_path, make_llama, train_a_little, write):
    make_llama().save_pretrained(tmp_path / "base")
    tensors = {"base_model.model.a.lora_A.weight": torch.ones(1, 1)}
    found = {}
    for name, config in {
        "task": {"task_type": "FEATURE_EXTRACTION"},
        "mapping": {"auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}},
        "nothing": {},
        "no model": {"auto_mapping": {"base_model_class": "LlamaConfig"}},
    }.items():
        adapter = read_adapter(write({"peft_type": "LORA"} | config, tensors, name))
        found[name] = type(skeleton(adapter, str(tmp_path / "base"))).__name__
    assert found == {
        "task": "LlamaModel",
        "mapping": "LlamaForSequenceClassification",
        "nothing": "LlamaForCausalLM",
        "no model": "LlamaForCausalLM",
    }


def test_base_that_is_not_there_is_named(rows, tmp_path):
    with pytest.raises(UserError, match=r"the base model '.*nowhere' cannot be read"):
        load_base(read_adapter(rows), str(tmp_path / "nowhere"))


def test_base_without_weights_is_named(rows, tmp_path, make_bert):
    make_bert().config.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"the base model '.*base' cannot be loaded"):
        load_base(read_adapter(rows), str(tmp_path / "base"))


def test_a_model_without_tokenizer_has_none(tmp_path, make_bert, tiny_tokenizer):
    make_bert().save_pretrained(tmp_path)
    assert load_processor(str(tmp_path)) is None
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(load_processor(str(tmp_path))) == len(tiny_tokenizer)


def test_unnamed_class_asks_for_task_type(tmp_path, make_bert, write):
    config = make_bert().config
    config.architectures = None
    config.save_pretrained(tmp_path / "base")
    folder = write({"peft_type": "LORA"}, {"base_model.model.a.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(
        UserError, match=r"says no task_type.*set task_type in its adapter_config.json to one of SEQ_CLS"
    ):
        load_base(read_adapter(folder), str(tmp_path / "base"))
