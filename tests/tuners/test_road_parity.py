"""Our RoAd layer against peft's own: outputs, gradients, merging, and files in both directions."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, RoadConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.road.layer import Linear as PeftRoadLinear
from peft.tuners.road.model import RoadModel as PeftRoadModel

from tests.tuners.models import build, output, perturb
from turnrow.tuners.road import RoadLinear

TARGETS = ["query", "key", "value", "dense"]
VARIANTS = pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
GROUPS = pytest.mark.parametrize("group_size", [2, 8])


@pytest.fixture
def stock(monkeypatch):
    """Run a function with peft's own RoAd behind the type ROAD."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, "ROAD", PeftRoadModel)
            return function()

    return run


def _adapted(variant, group_size, **to):
    model, inputs = build("roberta", **to)
    config = RoadConfig(variant=variant, group_size=group_size, target_modules=TARGETS)
    model = get_peft_model(model, config)
    perturb(model, 0.3)
    return model, inputs


def _layer_types(model):
    return {type(m) for m in model.modules() if isinstance(m, PeftRoadLinear)}


@VARIANTS
@GROUPS
def test_outputs_and_gradients_agree_with_peft(variant, group_size, stock):
    ours, inputs = _adapted(variant, group_size)
    theirs, _ = stock(lambda: _adapted(variant, group_size))
    assert _layer_types(ours) == {RoadLinear}
    assert _layer_types(theirs) == {PeftRoadLinear}
    for batch in (inputs, {k: v[:1] if k == "labels" else v[:1, :3] for k, v in inputs.items()}):  # folded and not
        for _ in range(2):  # the second step keeps the output itself
            torch.testing.assert_close(output(ours, batch), output(theirs, batch), rtol=1e-5, atol=1e-5)
            ours(**batch).loss.backward()
            theirs(**batch).loss.backward()
    for (name, got), (_, want) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if got.requires_grad:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6, msg=name)


@VARIANTS
@GROUPS
def test_files_go_both_ways(variant, group_size, stock, tmp_path):
    ours, inputs = _adapted(variant, group_size)
    ours.save_pretrained(tmp_path / "ours")
    loaded = stock(lambda: PeftModel.from_pretrained(build("roberta")[0], tmp_path / "ours"))
    assert _layer_types(loaded) == {PeftRoadLinear}
    torch.testing.assert_close(output(loaded, inputs), output(ours, inputs), rtol=1e-5, atol=1e-5)

    theirs, _ = stock(lambda: _adapted(variant, group_size))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(build("roberta")[0], tmp_path / "theirs")
    assert _layer_types(loaded) == {RoadLinear}
    torch.testing.assert_close(output(loaded, inputs), output(theirs, inputs), rtol=1e-5, atol=1e-5)


@VARIANTS
def test_merging_agrees_with_peft(variant, stock):
    ours, inputs = _adapted(variant, 8)
    theirs, _ = stock(lambda: _adapted(variant, 8))
    ours.merge_adapter()
    theirs.merge_adapter()
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), rtol=1e-4, atol=1e-5)


def test_a_batch_of_several_adapters_agrees_with_peft(stock):
    def mixed():
        model, inputs = _adapted("road_1", 8)
        model.add_adapter("other", RoadConfig(variant="road_4", group_size=2, target_modules=TARGETS))
        perturb(model, 0.2)
        model.eval()
        with torch.no_grad():
            ids = inputs["input_ids"]
            return model(torch.cat((ids, ids[:1])), adapter_names=["other", "default", "__base__"]).logits

    torch.testing.assert_close(mixed(), stock(mixed), rtol=1e-5, atol=1e-5)


def test_bfloat16_base_agrees_with_peft_within_rounding(stock):
    ours, inputs = _adapted("road_1", 8, dtype=torch.bfloat16)
    theirs, _ = stock(lambda: _adapted("road_1", 8, dtype=torch.bfloat16))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), rtol=0.05, atol=0.05)


@VARIANTS
def test_functional_transforms_see_the_gradient(variant):
    model, inputs = _adapted(variant, 4, dtype=torch.float64)
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    ids = {"input_ids": inputs["input_ids"]}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, kwargs=ids).logits.square().sum()

    gradients = torch.func.grad(loss)(trainable)
    loss({}).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_hooks_on_the_base_layer_still_run():
    model, inputs = _adapted("road_1", 4)
    calls = []
    layer = next(m for m in model.modules() if isinstance(m, RoadLinear))
    layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1))
    output(model, inputs)
    assert calls


def test_an_adapter_of_a_former_name_is_not_taken_for_the_former():
    model, inputs = _adapted("road_1", 8)
    layers = [m for m in model.modules() if isinstance(m, RoadLinear)]
    output(model, inputs)
    assert all("default" in layer._known for layer in layers)
    model.add_adapter("other", RoadConfig(variant="road_1", group_size=8, target_modules=TARGETS))
    model.set_adapter("other")
    model.delete_adapter("default")
    # A new parameter may lie at the address of the deleted one and have its version: nothing may be kept by name.
    assert not any("default" in layer._known or "default" in layer._watch for layer in layers)
