"""Bad configurations: the message names the thing, the value and what is allowed, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, RoadConfig, get_peft_model
from torch import nn

import turnrow
from tests.tuners.models import build, configure, identical, output, perturb, snapshot
from turnrow import RocoftConfig
from turnrow.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r is 0; it must be a whole number of rows or columns, 1 or more"),
        ({"r": -2}, r"r is -2; it must be"),
        ({"r": 1.5}, r"r is 1.5; it must be"),
        ({"r": True}, r"r is True; it must be"),
        (
            {"mode": "rows"},
            r"mode is 'rows'; it must be one of 'row', 'column', 'row.column', 'entry'; did you mean 'row'",
        ),
        ({"bias": "lora_only"}, r"bias is 'lora_only'; it must be one of 'none', 'rocoft_only', 'all'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"indices": 3}, r"indices is 3; it must be None, a list of numbers, a dict .* or the path of a file"),
        ({"indices": "first"}, r"indices is 'first', which is a strategy: say selection='first'"),
        (
            {"mode": "entry"},
            r"density is None; mode 'entry' needs the share of entries to train, above 0 and at most 1",
        ),
        ({"mode": "entry", "density": 1.5}, r"density is 1.5; mode 'entry' needs"),
        ({"mode": "entry", "density": True}, r"density is True; mode 'entry' needs"),
        ({"density": 0.1}, r"density is 0.1, but mode 'row' trains whole rows: set r, or mode='entry'"),
        ({"layers_pattern": "h"}, r"layers_pattern is set but layers_to_transform is not"),
        ({"layers_pattern": "[", "layers_to_transform": 0}, r"layers_pattern is '\[', which is no regular expression"),
        ({"layers_pattern": [1], "layers_to_transform": 0}, r"layers_pattern contains 1; names are texts, such as '1'"),
        ({"target_parameters": [3]}, r"target_parameters contains 3; names are texts, such as '3'"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; it must be a dict from module names to ranks"),
        ({"rank_pattern": "q"}, r"rank_pattern is 'q'; it must be a dict"),
        ({"rank_pattern": None}, r"rank_pattern is None; it must be a dict"),
        ({"rank_pattern": {1: 1}}, r"rank_pattern names 1; names of modules are texts, such as '1'"),
        ({"rank_pattern": {"[": 1}}, r"rank_pattern names '\[', which is no regular expression"),
        ({"within": {0: "::2"}}, r"within names 0; names of modules are texts, such as '0'"),
        ({"indices": {0: [1]}}, r"indices has the name 0; names of modules are texts, such as '0'"),
        ({"indices": {"q_proj": 3}}, r"indices\['q_proj'\] is 3; it must be a list of numbers"),
        ({"indices": {"q_proj": None}}, r"indices\['q_proj'\] is None; .* a module that selection serves is left out"),
        ({"indices": {"q_proj": {"row": "12"}}}, r"indices\['q_proj'\]\['row'\] is '12'; it must be a list"),
        ({"mode": "row+column", "indices": {"row": [1], "column": 3}}, r"indices\['column'\] is 3; it must be a list"),
        ({"indices": {"experts.down_proj": [[0, 1], 2, [4, 5]]}}, r"indices\['experts.down_proj'\] has 2 beside lists"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            r"layers_to_transform needs target_modules as a list",
        ),
    ],
)
def test_bad_fields_are_named_when_the_config_is_made(fields, message):
    with pytest.raises(UserError, match=message):
        RocoftConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "["}, r"target_modules is '\[', which is no regular expression: unterminated .*; put a backslash"),
        ({"target_modules": 5}, r"target_modules is 5; it must be None or a list of names, or one regular expression"),
        ({"target_modules": ["q_proj", 5]}, r"target_modules contains 5; names are texts, such as '5'"),
        ({"exclude_modules": "["}, r"exclude_modules is '\[', which is no regular expression"),
        ({"exclude_modules": {"q_proj": 1}}, r"exclude_modules is \{'q_proj': 1\}; it must be None or a list of names"),
        ({"layers_to_transform": "0"}, r"layers_to_transform is '0'; it must be None, the number of a layer, or a list"),
        ({"layers_to_transform": [0, True]}, r"layers_to_transform is \[0, True\]; it must be None"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save is 'lm_head'; it must be None or a list of names, such as \['lm_head'\]"),
        ({"modules_to_save": [None]}, r"modules_to_save contains None; names are texts"),
    ],
)  # fmt: skip
def test_what_names_no_modules_is_refused(fields, message):
    for method in (RocoftConfig, turnrow.RoadConfig):
        if fields.keys() <= vars(method()).keys():  # RoAd leaves out no modules or layers
            with pytest.raises(UserError, match=message):
                method(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RocoftConfig(r=17), r"r is 17, but module '\S+' has only (8|16) rows"),
        (RocoftConfig(r=17, mode="column"), r"r is 17, but module '\S+' has only 16 columns .*rank_pattern"),
        (RocoftConfig(rank_pattern={"v_proj": 9}, target_modules=["v_proj"]), r"r is 9, but module 'model\S+v_proj' has only 8"),
        (RocoftConfig(indices=[0, 16], target_modules=["q_proj"]), r"'model.layers.0.self_attn.q_proj' contain 16, .*0 to 15"),
        (
            RocoftConfig(mode="row+column", indices=[1, 2], target_modules=["q_proj"]),
            r"indices of module '\S+q_proj' are \[1, 2\]; mode 'row.column' needs \{'row': \[...\], 'column': \[...\]\}",
        ),
        (
            RocoftConfig(mode="row+column", indices={"row": [1]}, target_modules=["q_proj"]),
            r"are \{'row': \[1\]\}; mode 'row.column' needs",
        ),
        (
            RocoftConfig(mode="entry", density=0.1, indices=[256], target_modules=["q_proj"]),
            r"contain 256, which is out of range: it has 256 entries, numbered 0 to 255",
        ),
        (RocoftConfig(indices=[1, 1], target_modules=["q_proj"]), r"name row 1 more than once"),
        (
            RocoftConfig(indices={"v_proj": [0], "q_prj": [1]}, target_modules=["q_proj", "v_proj"]),
            r"indices: no target module is called 'q_prj'; did you mean 'q_proj'",
        ),
        (
            RocoftConfig(within={"qproj": "::2", "v_proj": "::2", "nothing": ":50%"}, target_modules=["q_proj", "v_proj"]),
            r"within: no target module is called 'qproj'; did you mean 'q_proj'.*, 'nothing'",
        ),
        (
            RocoftConfig(target_modules=["q_proj", "qproj", "nothing"]),
            r"match no module of the model: 'nothing', 'qproj'; did you mean 'q_proj'.* A name looks like 'model.layers.0",
        ),
        (RocoftConfig(target_modules=".*attn"), r"'\.\*attn', read as one regular expression, matches no whole|is a LlamaAttention"),
        (RocoftConfig(target_modules="q_proj"), r"'q_proj', read as one regular expression, matches no whole module name"),
        (RocoftConfig(target_modules=["input_layernorm"]), r"'model.layers.0.input_layernorm' is a LlamaRMSNorm; RoCoFT trains"),
        (RocoftConfig(target_modules=["embed_tokens"]), r"'model.embed_tokens' is a Embedding; RoCoFT trains linear layers"),
        (RocoftConfig(layers_to_transform=[7]), r"layers_to_transform is \[7\], but no linear module lies in such a layer"),
        (RocoftConfig(target_modules=["q_proj"], layers_to_transform=[7]), r"'q_proj' \(in no layer of layers_to_transform\)"),
        (RocoftConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), r"leave nothing to adapt: exclude_modules"),
        (RocoftConfig(bias="all"), r"bias is 'all', but the model has no bias there to train"),
        (RoadConfig(target_modules=["v_proj"]), r"group_size is 64, which does not divide the 8 output features of module "
         r"'model.layers.0.self_attn.v_proj'; use an even number that does, such as 8"),
        (RoadConfig(group_size=2, target_modules=["norm"]), r"target module 'model.norm' is a LlamaRMSNorm; RoAd rotates"),
        (RoadConfig(group_size=2, target_modules=["q_proj", "k_prj"]), r"'k_prj'; did you mean 'k_proj'"),
    ],
)  # fmt: skip
def test_bad_targets_are_named_and_the_model_is_untouched(config, message):
    model, inputs = build("llama")
    before, modules, reference = snapshot(model), [n for n, _ in model.named_modules()], output(model, inputs)
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        get_peft_model(model, config)
    assert identical(snapshot(model), before)
    assert [n for n, _ in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(output(model, inputs), reference)


def test_odd_group_size_is_refused():
    with pytest.raises(ValueError, match=r"group_size must be divisible by 2 .* but got 3"):
        RoadConfig(group_size=3)


def test_an_odd_layer_cannot_be_paired():
    with pytest.raises(UserError, match="module '0' has an odd number of output features, 3, which cannot be paired"):
        get_peft_model(nn.Sequential(nn.Linear(4, 3)), RoadConfig(group_size=2, target_modules=["0"]))


def test_the_projection_of_multihead_attention_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(UserError, match=r"'0.out_proj' belongs to a torch.nn.MultiheadAttention"):
        get_peft_model(model, RocoftConfig(target_modules=["out_proj"]))


def test_a_bad_second_adapter_leaves_the_first_alone():
    model, inputs = build("llama")
    model = get_peft_model(model, configure("row", model))
    perturb(model)
    adapted = output(model, inputs)
    with pytest.raises(UserError, match="'nothing'"):
        model.add_adapter("second", RocoftConfig(target_modules=["nothing"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model, inputs), adapted)


def test_an_adapter_of_another_shape_does_not_load(tmp_path):
    model, _ = build("llama")
    get_peft_model(model, RocoftConfig(target_modules=["down_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'down_proj'"):
        PeftModel.from_pretrained(build("roberta")[0], tmp_path)
