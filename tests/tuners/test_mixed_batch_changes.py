"""A batch of several adapters is stacked once and serves until something changes; adapters can be trained in one batch."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from peft import get_peft_model

from tests.tuners.mixed import BASE, alone, batch_of, mixed, several, with_adapter
from tests.tuners.models import ROAD, ROCOFT, build, configure, identical, perturb, snapshot
from turnrow import RocoftConfig
from turnrow.errors import UserError
from turnrow.tuners._mixed_batch import MixedBatchLayer

METHODS = pytest.mark.parametrize(
    "methods", [["row", "column", "row+column", "entry"], ["road_1", "road_2", "road_4"]], ids=["rocoft", "road"]
)


@pytest.fixture
def served(methods):
    """A model whose adapters are frozen, as loaded ones are, its inputs and the names."""
    model = several("llama", methods)
    model.requires_grad_(False)
    names = [*methods, BASE]
    return model, batch_of(model, len(names)), names


def _layers(model):
    return [module for module in model.modules() if isinstance(module, MixedBatchLayer)]


@pytest.fixture
def stackings(monkeypatch):
    """The layers that stacked anything, in order."""
    calls = []
    for cls in {type(layer) for methods in (["row"], ["road_1"]) for layer in _layers(several("llama", methods))}:
        original = cls.stack_adapters

        def counted(self, names, dtype, original=original):
            calls.append(self)
            return original(self, names, dtype)

        monkeypatch.setattr(cls, "stack_adapters", counted)
    return calls


def _close(model, inputs, names):
    torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names), rtol=1e-5, atol=1e-5)


# --- stacking --------------------------------------------------------------------------------------------------------


@METHODS
def test_all_steps_of_a_generation_share_one_stack(served, stackings):
    model, inputs, names = served
    model.generate(**inputs, adapter_names=names, max_new_tokens=5, pad_token_id=0)
    assert len(stackings) == len(set(stackings)) == len(_layers(model))


@METHODS
def test_the_same_names_again_are_not_stacked_again(served, stackings):
    model, inputs, names = served
    first = mixed(model, inputs, names)
    stackings.clear()
    assert torch.equal(mixed(model, inputs, names), first)
    assert not stackings
    mixed(model, inputs, names[::-1])
    assert len(stackings) == len(_layers(model))


@METHODS
def test_only_the_stacks_of_the_latest_batch_are_kept(served):
    model, inputs, names = served
    mixed(model, inputs, names)
    before = model.base_model._slot.last
    mixed(model, inputs, names[::-1])
    last = model.base_model._slot.last
    assert last is not before
    assert last.names == tuple(names[::-1])
    model.delete_adapter(names[1])
    assert model.base_model._slot.last is None


@METHODS
def test_copies_of_a_model_leave_the_stacks_behind(served):
    model, inputs, names = served
    expected = mixed(model, inputs, names)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.base_model._slot.last is None
        assert all(layer._slot is copied.base_model._slot for layer in _layers(copied))
        assert torch.equal(mixed(copied, inputs, names), expected)


@METHODS
def test_stacks_made_in_inference_mode_serve_where_gradients_are_asked_for(served):
    model, inputs, names = served
    with torch.inference_mode():
        expected = mixed(model, inputs, names)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    logits = model(inputs_embeds=embeddings, adapter_names=names).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings)
    assert gradient.abs().sum() > 0


# --- changes ---------------------------------------------------------------------------------------------------------


@METHODS
def test_values_changed_in_place_are_seen(served):
    model, inputs, names = served
    before = mixed(model, inputs, names)
    perturb(model, 0.2)
    assert not torch.allclose(mixed(model, inputs, names)[0], before[0])
    _close(model, inputs, names)


@METHODS
def test_values_of_an_adapter_in_training_changed_through_data_are_seen(served):
    model, inputs, names = served
    model.set_requires_grad(names[:1], True)
    before = mixed(model, inputs, names)
    for name, parameter in model.named_parameters():
        if name.endswith(names[0]):
            parameter.data.add_(0.3)
    after = mixed(model, inputs, names)
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])


@METHODS
def test_an_adapter_replaced_under_its_name_is_seen(served, methods):
    model, inputs, names = served
    mixed(model, inputs, names)
    plain = copy.deepcopy(model).unload()
    model.delete_adapter(methods[1])
    with pytest.raises(UserError, match=f"adapter_names has '{re.escape(methods[1])}'"):
        mixed(model, inputs, names)
    model.add_adapter(methods[1], configure(methods[0], plain))
    perturb(model, 0.2)
    model.eval()
    _close(model, inputs, names)


@METHODS
def test_an_adapter_added_in_between_joins_the_batch(served, methods):
    model, inputs, names = served
    mixed(model, inputs, names)
    model.add_adapter("more", configure(methods[2], copy.deepcopy(model).unload()))
    perturb(model, 0.2)
    model.eval()
    _close(model, inputs, ["more", *names[1:]])


@METHODS
def test_a_state_dict_loaded_in_between_is_seen(served):
    model, inputs, names = served
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = mixed(model, inputs, names)
    perturb(model, 0.2)
    mixed(model, inputs, names)
    for assign in (False, True):
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=assign)
        torch.testing.assert_close(mixed(model, inputs, names), expected)
        perturb(model, 0.2)
        mixed(model, inputs, names)


@METHODS
def test_a_model_cast_in_between_is_served_in_its_new_dtype(served):
    model, inputs, names = served
    mixed(model, inputs, names)
    model.double()
    assert model.base_model._slot.last is None
    assert mixed(model, inputs, names).dtype == torch.float64
    _close(model, inputs, names)


def test_rows_chosen_anew_are_seen():
    model = several("llama", ["row", "column"])
    model.requires_grad_(False)
    names, inputs = ["row", "column"], batch_of(model, 2)
    mixed(model, inputs, names)
    for layer in _layers(model):
        layer.set_index("row", "row", torch.tensor([5, 2, 9]) % layer.out_features)
    _close(model, inputs, names)


@pytest.mark.parametrize("mode", ["row", "column"])
def test_rows_and_columns_that_re_selection_settled_count(mode):
    model = several("llama", [mode, "row+column"])
    model.requires_grad_(False)
    names, inputs = [mode, "row+column"], batch_of(model, 2)
    before = mixed(model, inputs, names)
    for layer in _layers(model):
        shape = (2, layer.in_features) if mode == "row" else (layer.out_features, 2)
        layer.set_settled(mode, mode, torch.tensor([6, 4]), 0.2 * torch.randn(shape))
    assert not torch.allclose(mixed(model, inputs, names)[0], before[0])
    _close(model, inputs, names)


# --- and after -------------------------------------------------------------------------------------------------------


@METHODS
def test_the_active_adapter_serves_again_after_a_mixed_batch(served, methods):
    model, inputs, names = served
    model.set_adapter(methods[1])
    model.requires_grad_(False)
    with torch.no_grad():
        before = model(**inputs).logits
        mixed(model, inputs, names)
        torch.testing.assert_close(model(**inputs).logits, before)


@METHODS
def test_an_error_in_a_mixed_batch_leaves_nothing_behind(served):
    model, inputs, names = served
    with torch.no_grad():
        before = model(**inputs).logits
    with pytest.raises(UserError, match="given a batch of"):
        mixed(model, {"input_ids": inputs["input_ids"][:2]}, names)
    assert model.base_model._slot.batch is None
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before)


@METHODS
def test_the_base_weights_are_the_original_ones_to_the_bit_during_a_mixed_batch(served, methods):
    model, inputs, names = served
    with model.disable_adapter():
        original = snapshot(model)
    with_adapter(model, methods[0], lambda: model(**inputs))
    mixed(model, inputs, names)
    assert identical(snapshot(model), original)


# --- training --------------------------------------------------------------------------------------------------------


def _gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("methods", [list(ROCOFT), list(ROAD)], ids=["rocoft", "road"])
def test_all_adapters_of_a_batch_are_trained_as_alone(methods):
    model = several("roberta", methods).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    names = [*methods, BASE, methods[0]]
    inputs = batch_of(model, len(names))
    weights = torch.randn(len(names), 3)
    model.set_requires_grad(methods, True)
    (model(**inputs, adapter_names=names).logits * weights).sum().backward()
    together = _gradients(model)
    for sample, name in enumerate(names):
        if name == BASE:
            continue
        model.set_adapter(name)
        one = {key: value[sample : sample + 1] for key, value in inputs.items()}
        (model(**one).logits * weights[sample]).sum().backward()
    # Gradients add up over the samples of an adapter.
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert together.keys() == expected.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@METHODS
def test_gradients_of_a_mixed_batch_pass_to_the_input(served):
    model, inputs, names = served
    embed = model.get_input_embeddings()
    together = embed(inputs["input_ids"]).requires_grad_()
    model(inputs_embeds=together, adapter_names=names).logits.square().sum().backward()
    for sample, name in enumerate(names[:-1]):
        model.set_adapter(name)
        one = embed(inputs["input_ids"][sample : sample + 1]).detach().requires_grad_()
        model(inputs_embeds=one).logits.square().sum().backward()
        torch.testing.assert_close(together.grad[sample : sample + 1], one.grad, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_refused_because_the_names_are_gone_in_the_backward_pass():
    model = several("llama", ["row", "column"])
    inputs = batch_of(model, 2)
    inner = model.get_base_model()
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable()
    mixed(model, inputs, ["row", "column"])  # nothing is run again without a backward pass
    model.train()
    with pytest.raises(UserError, match="cannot be used with gradient checkpointing.*switch it off"):
        model(**inputs, adapter_names=["row", "column"])


def test_training_an_adapter_that_awaits_its_data_is_refused_in_a_batch_too():
    model = get_peft_model(build("llama")[0], RocoftConfig(selection="gradient", target_modules=["q_proj"]))
    inputs = batch_of(model, 2)
    mixed(model, inputs, ["default", BASE])
    with pytest.raises(UserError, match="'default' selects what it trains by data, and has seen none"):
        model(**inputs, adapter_names=["default", BASE])
