"""An adapter goes onto its own base, and onto no other without being told to."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import load_adapter
from turnrow.errors import UserError

TARGETS = ["query", "value"]
CONFIGS = {
    "row": RocoftConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", bias="all"),
    "column": RocoftConfig(r=2, mode="column", target_modules=TARGETS, task_type="SEQ_CLS"),
    "road": RoadConfig(variant="road_4", group_size=4, target_modules=TARGETS, task_type="SEQ_CLS"),
    "lora": LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", init_lora_weights=False),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
}

# Prompts lie beside the weights: no fingerprints, and peft cannot train them on.
ADAPTED = [name for name in CONFIGS if name not in ("prompt", "prefix")]


@pytest.fixture(params=CONFIGS)
def trained(request, tmp_path, make_bert, train_a_little, logits, save):
    """The folder of an adapter with manifest, and the logits of the model that was trained."""
    base = make_bert()
    base.config._name_or_path = "org/base"
    model = train_a_little(base, CONFIGS[request.param])
    return save(model, tmp_path / "adapter"), logits(model)


@pytest.fixture
def rows_folder(tmp_path, make_bert, train_a_little, save):
    return save(train_a_little(make_bert(), RocoftConfig(r=2, target_modules=TARGETS)), tmp_path / "rows")


def test_loaded_model_computes_what_was_trained(trained, make_bert, logits):
    model = load_adapter(make_bert(), trained[0])
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), trained[1])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("trained", ADAPTED, indirect=True)
def test_loaded_for_training_when_asked(trained, make_bert):
    model = load_adapter(make_bert(), trained[0], is_trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("trained", ["prompt", "prefix"], indirect=True)
def test_prompts_are_not_trained_on(trained, make_bert):
    with pytest.raises(UserError, match="(PROMPT|PREFIX)_TUNING adapter, which peft cannot load for more training"):
        load_adapter(make_bert(), trained[0], is_trainable=True)


def test_the_base_in_another_dtype_is_the_same_base(trained, make_bert):
    load_adapter(make_bert().bfloat16(), trained[0])


@pytest.mark.parametrize("trained", ADAPTED, indirect=True)
def test_another_base_is_an_error_naming_the_first_differing_module(trained, make_bert):
    base = make_bert()
    nn.init.normal_(base.bert.encoder.layer[1].attention.self.query.weight)
    name = r"bert\.encoder\.layer\.1\.attention\.self\.query"
    with pytest.raises(
        UserError, match=rf"\(org/base\): the first module that differs is '{name}': .*check_base=False"
    ):
        load_adapter(base, trained[0])


@pytest.mark.parametrize("trained", ADAPTED, indirect=True)
def test_check_base_false_overrides(trained, make_bert, logits):
    other = make_bert(seed=9)
    model = load_adapter(other, trained[0], check_base=False)
    assert not torch.equal(logits(model), trained[1])


def test_the_base_with_the_adapter_merged_in_is_another_base(rows_folder, make_bert):
    merged = load_adapter(make_bert(), rows_folder).merge_and_unload()
    with pytest.raises(UserError, match=r"the first module that differs is .*layer\.0.attention.self.query"):
        load_adapter(merged, rows_folder)


def test_without_manifest_the_base_is_not_compared_but_sizes_are(rows_folder, make_bert, make_llama):
    (rows_folder / "turnrow.json").unlink()
    load_adapter(make_bert(seed=9), rows_folder)
    with pytest.raises(UserError, match=r"this LlamaForCausalLM has no module 'bert\.encoder"):
        load_adapter(make_llama(), rows_folder)


def test_refusal_leaves_the_model_as_it_was(rows_folder, make_bert):
    base = make_bert(seed=9)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(UserError, match="another base"):
        load_adapter(base, rows_folder)
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())


def test_model_that_has_an_adapter_is_refused(rows_folder, make_bert):
    model = get_peft_model(make_bert(), LoraConfig(target_modules=TARGETS))
    for given in (model, model.get_base_model()):
        with pytest.raises(UserError, match=r"has an adapter already.*PeftModel\.load_adapter"):
            load_adapter(given, rows_folder)


def test_non_finite_adapter_is_refused(write, golden_rows, two_layers):
    config, tensors = golden_rows
    tensors["base_model.model.first.rocoft_row"][1, 1] = torch.nan
    with pytest.raises(UserError, match=r"first\.rocoft_row holds 1 NaN or infinite values of 12"):
        load_adapter(two_layers, write(config, tensors))


# --- golden files on a base of two layers -------------------------------------------------------------------------


def test_golden_rows_change_those_rows(write, golden_rows, two_layers):
    expected = two_layers.first.weight.detach().clone()
    expected[2] += torch.arange(6.0)
    expected[0] += torch.arange(6.0, 12.0)
    merged = load_adapter(two_layers, write(*golden_rows)).merge_and_unload()
    assert torch.equal(merged.first.weight, expected)
    assert merged.second.weight[1].tolist() == [5.0, 7.0, 8.0, 11.0]


def test_golden_columns_change_those_columns(write, golden_columns, two_layers):
    expected = two_layers.first.weight.detach().clone()
    expected[:, 5] += torch.tensor([0.0, 2.0, 4.0, 6.0])
    expected[:, 1] += torch.tensor([1.0, 3.0, 5.0, 7.0])
    assert torch.equal(load_adapter(two_layers, write(*golden_columns)).merge_and_unload().first.weight, expected)


@pytest.mark.parametrize(
    ("golden", "changes", "message"),
    [
        ("golden_rows", {"first.rocoft_row_index": torch.tensor([2, 4])}, "holds 4, out of range: allowed is 0 to 3"),
        (
            "golden_columns",
            {"first.rocoft_column_index": torch.tensor([6, 1])},
            "holds 6, out of range: allowed is 0 to 5",
        ),
        ("golden_rows", {"first.rocoft_row": torch.zeros(2, 5)}, r"\[2, 5\], the weight is 4 x 6 \(out x in\)"),
        ("golden_columns", {"first.rocoft_column": torch.zeros(5, 2)}, r"\[5, 2\], the weight is 4 x 6"),
        (
            "golden_road",
            {"first.road_theta": torch.zeros(3), "first.road_alpha": torch.ones(3)},
            "6 output features, the w",
        ),
        (
            "golden_rows",
            {"secund.rocoft_row": torch.zeros(2, 4), "secund.rocoft_row_index": torch.arange(2)},
            "'secund'; d",
        ),
        (
            "golden_rows",
            {"head.weight": torch.zeros(2, 4)},
            "it saved 'head.weight', which this TwoLayers does not have",
        ),
        (
            "golden_rows",
            {"second.bias": torch.zeros(7)},
            r"'second.bias' with shape \[7\], here it has \[4\] .*num_labels",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named(request, write, two_layers, golden, changes, message):
    config, tensors = request.getfixturevalue(golden)
    folder = write(config, tensors | {f"base_model.model.{name}": tensor for name, tensor in changes.items()})
    with pytest.raises(UserError, match=message):
        load_adapter(two_layers, folder, check_base=False)


def test_bias_for_a_module_without_one_is_named(write, golden_rows, two_layers):
    config, tensors = golden_rows
    tensors["base_model.model.first.rocoft_bias"] = torch.zeros(4)
    two_layers.first.bias = None
    with pytest.raises(UserError, match=r"module 'first': rocoft_bias is float32 \[4\], the module has no bias"):
        load_adapter(two_layers, write(config | {"bias": "all"}, tensors))


def test_module_that_is_no_linear_layer_is_named(write, golden_rows, two_layers):
    two_layers.second = nn.LayerNorm(4)
    with pytest.raises(UserError, match=r"module 'second': its weight has shape \[4\], rows are of matrices"):
        load_adapter(two_layers, write(*golden_rows))
    two_layers.second = nn.Identity()
    with pytest.raises(UserError, match="module 'second', a Identity, has no weight"):
        load_adapter(two_layers, write(*golden_rows, name="again"))
