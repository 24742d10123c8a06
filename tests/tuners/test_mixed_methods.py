"""RoCoFT and RoAd beside LoRA in one model, whichever comes first."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model

from tests.tuners.models import build, configure, identical, output, perturb, snapshot
from turnrow import RoadConfig
from turnrow.errors import UserError
from turnrow.tuners.mixed_methods import MixedModel

PAIRS = [
    ("road_1", "lora"),
    ("lora", "road_2"),
    ("row+column", "lora"),
    ("lora", "row"),
    ("entry", "lora"),
    ("row-bias", "road_4"),
    ("lora", "column-all-biases"),
]
every_pair = pytest.mark.parametrize(("first", "second"), PAIRS)


def _config(method):
    if method == "lora":
        return LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    return configure(method, build("roberta")[0])


def _mixed(first, second):
    base, inputs = build("roberta")
    model = get_peft_model(base, _config(first), adapter_name="first", mixed=True)
    model.add_adapter("second", _config(second))
    model.set_adapter(["first", "second"])
    perturb(model)
    return model, inputs


def _base(model):
    return {name: tensor for name, tensor in snapshot(model).items() if "lora_" not in name}


@every_pair
def test_both_act_are_trained_and_come_off(first, second):
    base, inputs = build("roberta")
    before, reference = snapshot(base), output(base, inputs)
    model, _ = _mixed(first, second)
    outputs = {}
    for active in (["first"], ["second"], ["first", "second"]):
        model.set_adapter(active)
        outputs[len(outputs)] = output(model, inputs)
    assert not torch.allclose(outputs[2], outputs[0], atol=1e-4)
    assert not torch.allclose(outputs[2], outputs[1], atol=1e-4)
    model(**inputs).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {any(part in name for name in trained) for part in (".first", ".second")} == {True}
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained and "pooler" not in name)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), reference)
        assert identical(_base(model), before)


@every_pair
def test_merging_from_the_inside_out_and_back_is_right_while_weights_are_live(first, second):
    model, inputs = _mixed(first, second)
    both = output(model, inputs)  # the inner layers are live now, and the outer ones write to the same weights
    model.base_model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), both, rtol=1e-4, atol=1e-6)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(output(model, inputs), both, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output(model.merge_and_unload(), inputs), both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", ["row", "road_1"])
def test_unloading_gives_the_base_back(first):
    base, _ = build("roberta")
    before = snapshot(base)
    model, inputs = _mixed(first, "lora")
    output(model, inputs)
    assert identical(snapshot(model.unload()), before)


def test_road_then_lora_is_the_sum_of_the_road_paper():
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False))
    weight = linear[0].weight.detach().clone()
    model = get_peft_model(linear, RoadConfig(group_size=2, target_modules=["0"]), adapter_name="turn", mixed=True)
    model.add_adapter("sum", LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter(["turn", "sum"])
    perturb(model, 0.5)
    alpha, theta, a, b = (
        next(p.detach() for name, p in model.named_parameters() if part in name)
        for part in ("road_alpha", "road_theta", "lora_A", "lora_B")
    )
    blocks = [s * torch.tensor([[t.cos(), -t.sin()], [t.sin(), t.cos()]]) for s, t in zip(alpha, theta, strict=True)]
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), x @ (torch.block_diag(*blocks) @ weight + b @ a).t())


def test_saved_adapters_meet_in_one_mixed_model(tmp_path):
    for method in ("row", "lora"):
        base, _ = build("roberta")
        model = get_peft_model(base, _config(method))
        perturb(model)
        model.save_pretrained(tmp_path / method)
    base, inputs = build("roberta")
    alone = {
        method: output(PeftModel.from_pretrained(build("roberta")[0], tmp_path / method), inputs)
        for method in ("row", "lora")
    }
    mixed = PeftMixedModel.from_pretrained(base, tmp_path / "row", adapter_name="row").eval()
    mixed.load_adapter(tmp_path / "lora", adapter_name="lora")
    for method in ("lora", "row"):
        mixed.set_adapter(method)
        torch.testing.assert_close(output(mixed, inputs), alone[method])
    assert type(mixed.base_model) is MixedModel


def test_methods_of_peft_mix_as_before():
    base, inputs = build("roberta")
    reference = output(base, inputs)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]), mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["query", "value"], init_weights=False))
    assert torch.allclose(output(model, inputs), reference, atol=1e-6)
    model.set_adapter(["default", "loha"])
    assert not torch.allclose(output(model, inputs), reference, atol=1e-4)


# --- batches of several adapters ---------------------------------------------------------------------------------------


def _three(order):
    """A model with rows, RoAd and LoRA, in that order."""
    base, inputs = build("roberta")
    first, *others = order
    model = get_peft_model(base, _config(first), adapter_name=f"a {first}", mixed=True)
    for method in others:
        model.add_adapter(f"a {method}", _config(method))
    perturb(model)
    return model.eval(), inputs["input_ids"].repeat(2, 1)


@pytest.mark.parametrize(
    "order", [("row-bias", "lora", "road_4"), ("road_4", "row-bias", "lora"), ("lora", "road_4", "row")]
)
def test_a_batch_gives_every_sample_an_adapter_of_whatever_method(order):
    model, ids = _three(order)
    names = [f"a {order[2]}", f"a {order[0]}", "__base__", f"a {order[1]}"]
    with torch.no_grad():
        together = model(input_ids=ids, adapter_names=names).logits
        for sample, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids[sample : sample + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids[sample : sample + 1]).logits
            torch.testing.assert_close(together[sample : sample + 1], alone, rtol=1e-5, atol=1e-5)


def test_generation_takes_a_batch_of_several_methods_too():
    base, inputs = build("llama")
    ids = inputs["input_ids"]
    model = get_peft_model(base, configure("row", base), adapter_name="row", mixed=True)
    model.add_adapter("road", configure("road_1", build("llama")[0]))
    perturb(model, 0.4)
    model.eval()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids, adapter_names=["road", "row"], **settings)
    for sample, name in enumerate(("road", "row")):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[sample : sample + 1], **settings)
        assert torch.equal(together[sample : sample + 1], alone)


def test_a_method_that_serves_one_adapter_at_a_time_is_refused_in_a_batch_of_several():
    base, inputs = build("roberta")
    model = get_peft_model(base, _config("row"), adapter_name="row", mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["query"]))
    with pytest.raises(UserError, match=r"adapter_names cannot be used with '\S+query', a layer of peft.tuners.loha"):
        model(input_ids=inputs["input_ids"], adapter_names=["row", "row"])
