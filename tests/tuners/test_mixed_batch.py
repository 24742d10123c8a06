"""`adapter_names`: in a batch of several adapters every sample comes out as it does alone, its adapter being active."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from peft import RoadConfig, get_peft_model
from peft.tuners.road.model import RoadModel as PeftRoadModel
from torch import nn
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from tests.tuners.mixed import BASE, alone, batch_of, mixed, several, with_adapter
from tests.tuners.models import ROAD, ROCOFT, build, configure, has_biases, perturb
from turnrow import RocoftConfig
from turnrow.errors import UserError
from turnrow.tuners.road import RoadModel

FAMILIES = pytest.mark.parametrize("family", [ROCOFT, ROAD], ids=["rocoft", "road"])
ARCHITECTURES = pytest.mark.parametrize("architecture", ["roberta", "llama", "gpt2", "falcon", "t5", "bart", "vit"])


def _methods(family, architecture):
    return [method for method in family if has_biases(architecture) or "bias" not in method]


@FAMILIES
@ARCHITECTURES
def test_every_sample_comes_out_as_alone(family, architecture):
    methods = _methods(family, architecture)
    model = several(architecture, methods)
    names = [*methods, BASE, methods[0], BASE]
    inputs = batch_of(model, len(names))
    torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names), rtol=1e-5, atol=1e-5)


@FAMILIES
def test_every_pair_of_methods_shares_a_batch(family):
    model = several("roberta", list(family))
    inputs = batch_of(model, 3)
    expected = {name: alone(model, inputs, [name] * 3) for name in (*family, BASE)}
    for first, second in combinations(expected, 2):
        for names in ([first, second, first], [second, first, BASE]):
            each = torch.stack([expected[name][sample] for sample, name in enumerate(names)])
            torch.testing.assert_close(mixed(model, inputs, names), each, rtol=1e-5, atol=1e-5)


def test_adapters_differ_in_rank_and_in_the_modules_they_are_for():
    model = get_peft_model(build("llama")[0], RocoftConfig(r=1, target_modules=["q_proj"]), adapter_name="small")
    model.add_adapter("large", RocoftConfig(r=7, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}))
    model.add_adapter("columns", RocoftConfig(r=4, mode="column", target_modules=["up_proj"]))
    perturb(model, 0.2)
    model.eval()
    names = ["large", "columns", BASE, "small"]
    inputs = batch_of(model, 4)
    torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names), rtol=1e-5, atol=1e-5)


@FAMILIES
def test_the_base_model_among_adapters_is_the_base_to_the_bit(family):
    model = several("llama", _methods(family, "llama"))
    inputs = batch_of(model, 4)
    with_adapter(model, next(iter(family)), lambda: model(**inputs))  # the weights hold what it trained
    names = [next(iter(family)), BASE, BASE, next(iter(family))]
    with model.disable_adapter(), torch.no_grad():
        expected = model(**inputs).logits
    assert torch.equal(mixed(model, inputs, names)[1:3], expected[1:3])
    assert torch.equal(mixed(model, inputs, [BASE] * 4), expected)


@FAMILIES
def test_bfloat16_comes_out_as_alone_up_to_rounding(family):
    methods = _methods(family, "gpt2")
    model = several("gpt2", methods, size=0.05, dtype=torch.bfloat16)
    names = [*methods, BASE]
    inputs = batch_of(model, len(names))
    result = mixed(model, inputs, names)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, alone(model, inputs, names), rtol=0.05, atol=0.05)


@FAMILIES
def test_adapters_of_different_dtypes_share_a_batch(family):
    methods = [method for method in _methods(family, "llama") if "column" not in method]
    model = several("llama", methods, size=0.05, dtype=torch.bfloat16)
    plain = build("llama", dtype=torch.bfloat16)[0]
    for method in methods[:2]:
        model.add_adapter(f"half {method}", configure(method, plain), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "half" in name:
            parameter.data = parameter.data.bfloat16()
    perturb(model)
    model.eval()
    names = [*(f"half {method}" for method in methods[:2]), *methods]
    inputs = batch_of(model, len(names))
    torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names), rtol=0.05, atol=0.05)


@FAMILIES
def test_under_autocast_every_sample_comes_out_as_alone_up_to_rounding(family):
    methods = _methods(family, "llama")
    model = several("llama", methods, size=0.05)
    inputs = batch_of(model, len(methods))
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = mixed(model, inputs, methods), alone(model, inputs, methods)
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)


@FAMILIES
def test_padding_of_one_sample_does_not_touch_another(family):
    methods = _methods(family, "llama")
    model = several("llama", methods)
    names = [*methods, BASE]
    ids = batch_of(model, len(names))["input_ids"]
    lengths = [3 + sample % 7 for sample in range(len(names))]
    mask = torch.tensor([[0] * (9 - length) + [1] * length for length in lengths])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}
    result = mixed(model, padded, names)
    for sample, (name, length) in enumerate(zip(names, lengths, strict=True)):
        expected = alone(model, {"input_ids": ids[sample : sample + 1, -length:]}, [name])
        torch.testing.assert_close(result[sample : sample + 1, -length:], expected, rtol=1e-5, atol=1e-5)


# --- generation ------------------------------------------------------------------------------------------------------

SOME = pytest.mark.parametrize(
    "methods",
    [["row-indices", "column", "row+column", "entry"], ["road_1", "road_2", "road_4"]],
    ids=["rocoft", "road"],
)
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


def _generate(model, inputs, names=None, **settings):
    inputs = {"input_ids": inputs["input_ids"]}
    names = {} if names is None else {"adapter_names": names}
    return model.generate(**inputs, **names, **LENGTH, **settings)


def _generated_alone(model, inputs, names, **settings):
    samples = inputs["input_ids"].split(1)
    return torch.cat(
        [
            with_adapter(model, name, lambda ids=ids: _generate(model, {"input_ids": ids}, **settings))
            for name, ids in zip(names, samples, strict=True)
        ]
    )


@SOME
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_greedy_and_beam_search_find_the_same_as_alone(methods, task, settings):
    methods = _methods(methods, "llama")
    model = several("llama", methods, size=0.4, task=task)
    names = [*methods, BASE]
    inputs = batch_of(model, len(names))
    found = _generate(model, inputs, names, do_sample=False, **settings)
    assert torch.equal(found, _generated_alone(model, inputs, names, do_sample=False, **settings))


@SOME
@pytest.mark.parametrize("architecture", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_sees_each_sample_once_and_its_decoder_every_beam(methods, architecture, beams):
    methods = _methods(methods, architecture)
    model = several(architecture, methods, size=0.4)
    names = [*methods, BASE]
    inputs = batch_of(model, len(names))
    found = _generate(model, inputs, names, do_sample=False, num_beams=beams)
    assert torch.equal(found, _generated_alone(model, inputs, names, do_sample=False, num_beams=beams))


@SOME
def test_beams_may_be_asked_for_by_a_generation_config(methods):
    methods = _methods(methods, "llama")[:3]
    model = several("llama", methods, size=0.4)
    inputs = batch_of(model, len(methods))
    config = GenerationConfig(num_beams=3, **LENGTH)
    found = model.generate(**inputs, adapter_names=methods, generation_config=config)
    assert torch.equal(found, _generated_alone(model, inputs, methods, do_sample=False, num_beams=3))
    model.generation_config.num_beams = 3  # and by the model's own
    found = model.generate(**inputs, adapter_names=methods, **LENGTH)
    assert torch.equal(found, _generated_alone(model, inputs, methods, do_sample=False, num_beams=3))


@SOME
@pytest.mark.parametrize("sequences", [1, 2])
def test_sampled_tokens_are_drawn_from_what_each_adapter_says_alone(methods, sequences):
    methods = _methods(methods, "llama")
    model = several("llama", methods, size=0.4)
    names = [*methods, BASE]
    inputs = batch_of(model, len(names))
    torch.manual_seed(5)
    found = _generate(
        model, inputs, names, do_sample=True, num_return_sequences=sequences, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    each = [name for name in names for _ in range(sequences)]
    expected = alone(model, {"input_ids": found.sequences[:, :-1]}, each)[:, -6:]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, rtol=1e-4, atol=1e-5)


def test_sampling_by_a_seed_finds_the_same_as_the_active_adapter():
    model = several("llama", ["row", "column"], size=0.4)
    inputs = batch_of(model, 3)
    torch.manual_seed(5)
    found = _generate(model, inputs, ["column"] * 3, do_sample=True)
    torch.manual_seed(5)
    assert torch.equal(found, with_adapter(model, "column", lambda: _generate(model, inputs, do_sample=True)))


# --- modules that an adapter has whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_every_sample_goes_through_the_head_of_its_own_adapter(architecture):
    head, targets = {"roberta": ("classifier", ["query", "value"]), "llama": ("lm_head", ["q_proj"])}[architecture]
    config = RocoftConfig(target_modules=targets, modules_to_save=[head])
    model = get_peft_model(build(architecture)[0], config, adapter_name="first")
    model.add_adapter("second", RocoftConfig(mode="column", target_modules=targets, modules_to_save=[head]))
    model.add_adapter("headless", RocoftConfig(target_modules=targets))
    perturb(model, 0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    names = ["second", "first", "headless", BASE, "second"]
    inputs = batch_of(model, 5)
    expected = alone(model, inputs, names)
    for active in ("first", "headless"):  # which adapter is active makes no difference
        model.set_adapter(active)
        torch.testing.assert_close(mixed(model, inputs, names), expected, rtol=1e-5, atol=1e-5)
    model.set_adapter("first")
    torch.testing.assert_close(model(**inputs).logits, alone(model, inputs, ["first"] * 5), rtol=1e-5, atol=1e-5)


# --- layers of peft's own --------------------------------------------------------------------------------------------


def test_layers_of_pefts_own_get_a_name_for_every_row(monkeypatch):
    """As where a weight is of a kind that our layer does not know."""
    monkeypatch.setattr(RoadModel, "_create_new_module", staticmethod(PeftRoadModel._create_new_module))
    model = get_peft_model(build("t5")[0], RoadConfig(group_size=4, target_modules=["q", "v"]), adapter_name="first")
    model.add_adapter("second", RoadConfig(variant="road_2", group_size=8, target_modules=["q", "v"]))
    monkeypatch.undo()
    perturb(model, 0.4)
    model.eval()
    names = ["second", BASE, "first"]
    inputs = batch_of(model, 3)
    assert {type(m).__module__ for m in model.modules() if hasattr(m, "road_theta")} == {"peft.tuners.road.layer"}
    found = _generate(model, inputs, names, do_sample=False, num_beams=2)
    assert torch.equal(found, _generated_alone(model, inputs, names, do_sample=False, num_beams=2))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two():
    model = several("llama", ["row", "column"])
    return model, batch_of(model, 3)


def test_a_name_that_is_not_loaded_is_refused_with_those_that_are(two):
    model, inputs = two
    with pytest.raises(UserError, match="'colunm'; did you mean 'column'.*Loaded are 'row', 'column'.*'__base__'"):
        mixed(model, inputs, ["row", "colunm", BASE])
    with pytest.raises(UserError, match="'_base_'; did you mean '__base__'"):
        mixed(model, inputs, ["row", "_base_", BASE])


@pytest.mark.parametrize("names", [["row", "column"], ["row"], ["row"] * 4, ["row"] * 6, [BASE] * 2])
def test_a_wrong_number_of_names_is_refused(two, names):
    model, inputs = two
    with pytest.raises(UserError, match=f"adapter_names has {len(names)} names, but a layer was given a batch of 3"):
        mixed(model, inputs, names)


def test_a_wrong_number_of_names_is_refused_in_beam_search_too(two):
    model, inputs = two
    with pytest.raises(
        UserError, match="has 2 names, but a layer was given a batch of 12 \\(expected 2, or 8 with all beams"
    ):
        _generate(model, inputs, ["row", "column"], num_beams=4)


@pytest.mark.parametrize("names", ["row", [], [1, 2, 3], {"row": 1}])
def test_adapter_names_must_be_a_list_of_names(two, names):
    model, inputs = two
    with pytest.raises(UserError, match="must be a list with the name of an adapter for each sample"):
        model(**inputs, adapter_names=names)


@pytest.mark.parametrize("method", ["row", "road_1"])
def test_merged_adapters_are_refused(method):
    model = several("llama", [method])
    inputs = batch_of(model, 2)
    expected = mixed(model, inputs, [method, BASE])
    model.merge_adapter()
    with pytest.raises(UserError, match=f"merged into the weights \\('{method}'\\).*unmerge_adapter"):
        mixed(model, inputs, [method, BASE])
    model.unmerge_adapter()
    torch.testing.assert_close(mixed(model, inputs, [method, BASE]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["row", "road_1"])
def test_disabled_adapters_give_the_base_whatever_the_names(method):
    model = several("llama", [method])
    inputs = batch_of(model, 2)
    with model.disable_adapter():
        assert torch.equal(mixed(model, inputs, [method, method]), mixed(model, inputs, [BASE, BASE]))


def test_a_model_that_flattens_its_tokens_is_refused():
    config = OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16,
        max_position_embeddings=40,
    )  # fmt: skip
    model = get_peft_model(OPTForCausalLM(config), RocoftConfig(target_modules=["q_proj", "fc1"])).eval()
    with pytest.raises(UserError, match="given a batch of 18.*flattens samples and tokens into one dimension"):
        mixed(model, {"input_ids": torch.randint(3, 64, (2, 9))}, ["default", BASE])


class _Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.experts[0](x) + self.experts[1](x)


def test_experts_are_refused_because_they_see_tokens_and_not_samples():
    model = get_peft_model(_Experts(), RocoftConfig(r=1, target_modules=["experts.0", "experts.1"]))
    with pytest.raises(UserError, match="adapter on 'experts.0': an expert gets the tokens of all samples"):
        model(torch.randn(2, 4), adapter_names=["default", BASE])


def test_a_bias_of_a_module_of_unknown_kind_is_refused():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return 2 * (x + self.bias)

    model = nn.Sequential(nn.Linear(4, 4), Shifted())
    model = get_peft_model(model, RocoftConfig(r=1, target_modules=["0"], bias="all"))
    with pytest.raises(UserError, match="trained bias of a Shifted"):
        model(torch.randn(2, 4), adapter_names=["default", BASE])
