"""Exact parameter counts, from the configuration alone (meta device)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, RoadConfig, get_peft_model
from torch import nn

from tests.tuners.models import build
from turnrow import RocoftConfig, count_parameters

ROBERTA = r"roberta\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _roberta_base():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        return RobertaForSequenceClassification(config)


def _llama_2_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # the defaults are those of LLaMA-2-7B


@pytest.mark.parametrize(("r", "expected"), [(1, 82_944), (3, 248_832)])
def test_roberta_base_rows_as_the_paper_counts(r, expected):
    model = get_peft_model(_roberta_base(), RocoftConfig(r=r, target_modules=ROBERTA))
    assert count_parameters(model).trainable == expected


@pytest.mark.parametrize(("mode", "per_unit"), [("row", 1_138_688), ("column", 1_359_872)])
@pytest.mark.parametrize("r", [1, 3])
def test_llama_2_7b(mode, per_unit, r):
    model = get_peft_model(_llama_2_7b(), RocoftConfig(r=r, mode=mode, target_modules=LLAMA))
    count = count_parameters(model)
    assert count.trainable == r * per_unit
    assert {p.device.type for p in model.parameters()} == {"meta"}
    indices = 32 * 7 * r  # the chosen rows or columns are buffers
    rotary = sum(b.numel() for b in _llama_2_7b().buffers())
    assert count.total == 6_738_415_616 + r * per_unit + indices + rotary


@pytest.mark.parametrize("r", [1, 3])
def test_rows_and_columns_together_count_their_crossing_once(r):
    model = get_peft_model(_llama_2_7b(), RocoftConfig(r=r, mode="row+column", target_modules=LLAMA))
    crossings = 32 * 7 * r * r
    assert count_parameters(model).trainable == r * (1_138_688 + 1_359_872) - crossings


@pytest.mark.parametrize("density", [0.1, 0.01])
def test_entries_are_the_share_of_each_weight_that_was_asked_for(density):
    model = get_peft_model(_roberta_base(), RocoftConfig(mode="entry", density=density, target_modules=ROBERTA))
    expected = 12 * (4 * round(density * 768 * 768) + 2 * round(density * 768 * 3072))
    assert count_parameters(model).trainable == expected


def test_road_on_llama_2_7b():
    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    for variant, parameters in (("road_1", outputs), ("road_2", 2 * outputs), ("road_4", 4 * outputs)):
        model = get_peft_model(_llama_2_7b(), RoadConfig(variant=variant, target_modules=LLAMA))
        assert count_parameters(model).trainable == parameters


def test_heads_and_biases_are_counted():
    model = get_peft_model(
        _roberta_base(), RocoftConfig(r=1, target_modules=ROBERTA, bias="rocoft_only", task_type="SEQ_CLS")
    )
    head = 768 * 768 + 768 + 768 * 2 + 2
    assert count_parameters(model).trainable == 82_944 + 82_944 + head  # as many bias entries as row entries, by chance

    model = get_peft_model(_roberta_base(), RocoftConfig(r=1, target_modules=ROBERTA, bias="all"))
    norms_and_head = 768 * (1 + 2 * 12) + 768 + 2
    assert count_parameters(model).trainable == 82_944 + 82_944 + norms_and_head


def test_buffers_and_tied_weights_count_once():
    model = nn.Module()
    model.a = nn.Linear(3, 2, bias=False)
    model.b = nn.Linear(3, 2, bias=False)
    model.b.weight = model.a.weight
    model.register_buffer("mean", torch.zeros(5))
    model.a.weight.requires_grad_(False)
    assert count_parameters(model) == (0, 11)
    assert str(count_parameters(model)) == "trainable 0 of 11 parameters (0.000 %)"
    assert count_parameters(nn.Module()).percent == 0


def test_other_methods_are_counted_as_peft_counts_them():
    model, _ = build("llama")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert count_parameters(model).trainable == model.get_nb_trainable_parameters()[0]


def test_default_targets_are_all_linear_layers_but_the_head():
    model, _ = build("llama")
    model = get_peft_model(model, RocoftConfig(r=1))
    assert len(model.base_model.targeted_module_names) == 14
    assert "lm_head" not in model.base_model.targeted_module_names


def test_layer_numbers_apply_to_the_default_targets_too():
    model, _ = build("llama")
    model = get_peft_model(model, RocoftConfig(r=1, layers_to_transform=[1]))
    names = model.base_model.targeted_module_names
    assert len(names) == 7
    assert all(".layers.1." in name for name in names)


def test_rank_pattern_gives_a_module_its_own_rank():
    model, _ = build("llama")
    model = get_peft_model(model, RocoftConfig(r=1, rank_pattern={"q_proj": 4, r"layers\.0.*v_proj": 2}))
    ranks = {n: p.shape[0] for n, p in model.named_parameters() if "rocoft_row" in n}
    by_name = {
        n.removeprefix("base_model.model.model.layers.").removesuffix(".rocoft_row.default"): r
        for n, r in ranks.items()
    }
    assert by_name["1.self_attn.q_proj"] == 4
    assert by_name["0.self_attn.v_proj"] == 2
    assert by_name["1.self_attn.v_proj"] == 1


def _mixture(config_class, model_class, **fields):
    import transformers

    with torch.device("meta"):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))


@pytest.mark.parametrize("r", [1, 3])
def test_experts_of_mixtral_8x7b_from_its_configuration(r):
    # hidden 4096, intermediate 14336, 32 layers of 8 experts: the defaults
    base = _mixture("MixtralConfig", "MixtralForCausalLM", hidden_size=4096, intermediate_size=14336)
    total = sum(p.numel() for p in base.parameters())
    assert total == 46_702_792_704  # as published for Mixtral-8x7B
    gate_up, down = (2 * 14336, 4096), (4096, 14336)
    config = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": r}
    rows, columns, crossing = (
        32 * 8 * r * sum(sizes) for sizes in ((gate_up[1], down[1]), (gate_up[0], down[0]), (r, r))
    )
    assert (rows, columns) == (4_718_592 * r, 8_388_608 * r)
    for mode, expected in (("row", rows), ("column", columns), ("row+column", rows + columns - crossing)):
        model = get_peft_model(
            _mixture("MixtralConfig", "MixtralForCausalLM", hidden_size=4096, intermediate_size=14336),
            RocoftConfig(mode=mode, **config),
        )
        count = count_parameters(model)
        assert count.trainable == expected
        assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("mode", ["row", "column", "row+column", "entry"])
def test_every_linear_layer_and_expert_of_a_qwen_mixture_counts(mode):
    model, _ = build("qwen2_moe")
    r, density = 3, 0.1
    attention = [(16, 16), (8, 16), (8, 16), (16, 16)]
    shared = [(24, 16), (24, 16), (16, 24)]
    experts = 6 * [(16, 16), (16, 8)]
    per_matrix = {
        "row": lambda out, into: r * into,
        "column": lambda out, into: r * out,
        "row+column": lambda out, into: r * into + r * (out - r),
        "entry": lambda out, into: round(density * out * into),
    }[mode]
    expected = 2 * sum(per_matrix(*shape) for shape in attention + shared + experts)
    config = RocoftConfig(mode=mode, r=r, density=density if mode == "entry" else None)
    assert count_parameters(get_peft_model(model, config)).trainable == expected
