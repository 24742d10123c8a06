"""Re-selection: what was learned stays, the optimizer's state follows, the budget holds, and merging stays exact."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.tuners.models import build, configure, identical, output, snapshot
from turnrow import RocoftConfig
from turnrow.errors import UserError
from turnrow.tuners import check_reselection, move_optimizer_state, reselect, unite

MODES = pytest.mark.parametrize("mode", ["row", "column"])
STRATEGIES = pytest.mark.parametrize("strategy", ["gradient", "fisher", "cycle"])


def _model(mode, **fields):
    base, inputs = build("llama")
    model = get_peft_model(base, configure(mode, base, **fields))
    return model, inputs, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def _train(model, inputs, optimizer, steps=2):
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _layers(model):
    return [m for m in model.modules() if hasattr(m, "parts") and m.parts("default")]


def _indices(layer, mode):
    return [piece.index.tolist() for piece in layer.parts("default")]


@MODES
@STRATEGIES
def test_the_model_computes_what_it_did_and_goes_on_learning(mode, strategy):
    model, inputs, optimizer = _model(mode)
    before = snapshot(build("llama")[0])
    losses = []
    for _ in range(3):
        _train(model, inputs, optimizer)
        expected = output(model, inputs)
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        move_optimizer_state(optimizer, reselect(model, [inputs], strategy=strategy))
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-6)
        losses.append(model(**inputs).loss.item())
    assert losses[2] < losses[0]
    with model.disable_adapter():
        assert identical(snapshot(model), before)
    for layer in _layers(model):
        trained, *settled = _indices(layer, mode)
        assert len(trained) == 3
        assert not set(trained) & {i for index in settled for i in index}


@MODES
def test_one_adapter_of_all_that_was_trained_computes_the_same_saved_loaded_and_merged(mode, tmp_path):
    model, inputs, optimizer = _model(mode)
    for _ in range(3):
        _train(model, inputs, optimizer)
        move_optimizer_state(optimizer, reselect(model, None, strategy="cycle"))
    _train(model, inputs, optimizer)
    expected = output(model, inputs)
    unite(model)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-6)
    assert {len(layer.parts("default")) for layer in _layers(model)} == {1}
    assert all(
        index == sorted(range(12))
        for layer in _layers(model)
        if layer.in_features == layer.out_features == 16
        for index in _indices(layer, mode)
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama")[0], tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert torch.equal(output(loaded.merge_and_unload(), inputs), output(model, inputs))


@MODES
def test_what_is_settled_is_in_the_file_of_a_checkpoint_and_comes_back(mode, tmp_path):
    model, inputs, optimizer = _model(mode)
    _train(model, inputs, optimizer)
    reselect(model, [inputs], strategy="gradient")
    _train(model, inputs, optimizer)
    model.save_pretrained(tmp_path)
    for other in (_model(mode)[0], model):
        if other is model:  # whatever was settled there before gives way
            reselect(other, None, strategy="cycle")
        expected = output(PeftModel.from_pretrained(build("llama")[0], tmp_path), inputs)
        other.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(output(other, inputs), expected)


@MODES
def test_the_state_of_the_optimizer_follows_its_rows_and_is_zero_for_fresh_ones(mode):
    model, inputs, optimizer = _model(mode)
    _train(model, inputs, optimizer)
    layer = _layers(model)[0]
    parameter = layer.parts("default")[0].parameter
    moment = optimizer.state[parameter]["exp_avg"].clone()
    old = layer.parts("default")[0].index.tolist()
    move_optimizer_state(optimizer, reselect(model, [inputs], strategy="gradient"))
    new = layer.parts("default")[0].index.tolist()
    axis = 0 if mode == "row" else 1
    moved = optimizer.state[parameter]["exp_avg"]
    for place, number in enumerate(new):
        values = moved.select(axis, place)
        if number in old:
            assert torch.equal(values, moment.select(axis, old.index(number)))
        else:
            assert not values.any()
    assert optimizer.state[parameter]["step"] == 2


@MODES
def test_a_row_that_comes_back_goes_on_from_what_it_had_learned(mode):
    model, inputs, optimizer = _model(mode, rank_pattern={})
    _train(model, inputs, optimizer)
    layer = next(layer for layer in _layers(model) if layer.in_features == layer.out_features == 16)
    first = layer.parts("default")[0]
    learned = first.parameter.detach().clone()
    seen = []
    for _ in range(6):
        reselect(model, None, strategy="cycle", budget=6)
        seen.append(layer.parts("default")[0].index.tolist())
    assert seen == [[3, 4, 5], [0, 1, 2]] * 3
    assert torch.equal(layer.parts("default")[0].parameter, learned)


@MODES
@STRATEGIES
def test_the_budget_caps_how_many_are_ever_trained(mode, strategy):
    model, inputs, optimizer = _model(mode)
    ever = {id(layer): set() for layer in _layers(model)}
    for _ in range(5):
        for layer in _layers(model):
            ever[id(layer)] |= set(layer.parts("default")[0].index.tolist())
        _train(model, inputs, optimizer, steps=1)
        move_optimizer_state(optimizer, reselect(model, [inputs], strategy=strategy, budget=7))
    assert all(3 < len(numbers) <= 7 for numbers in ever.values()) or strategy != "cycle"
    assert all(len(numbers) <= 7 for numbers in ever.values())


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (RocoftConfig(mode="row+column"), {}, r"reselection needs mode 'row' or 'column'; mode is 'row\+column'"),
        (
            RocoftConfig(),
            {"strategy": "wanda_max"},
            "reselection.strategy is 'wanda_max'; it must be one of 'gradient'",
        ),
        (RocoftConfig(r=5), {"budget": 4}, "reselection.budget is 4, below the 5 rows that are trained at once"),
        (None, {}, "reselection is for method rocoft; the adapter is of NoneType"),
    ],
)
def test_what_cannot_be_selected_anew_is_refused(config, settings, message):
    with pytest.raises(UserError, match=message):
        check_reselection(config, **{"strategy": "gradient", "budget": None, **settings})
