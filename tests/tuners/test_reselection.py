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
    before = [
        (piece.index.tolist(), optimizer.state[piece.parameter]["exp_avg"] / (1 - 0.9**2))
        for piece in (layer.parts("default")[0] for layer in _layers(model))
    ]
    move_optimizer_state(optimizer, reselect(model, [inputs], strategy="gradient"))
    axis, staying = (0 if mode == "row" else 1), 0
    for layer, (old, corrected) in zip(_layers(model), before, strict=True):
        piece = layer.parts("default")[0]
        state = optimizer.state[piece.parameter]
        for place, number in enumerate(piece.index.tolist()):
            values = state["exp_avg"].select(axis, place) / (1 - 0.9)
            if number in old:
                torch.testing.assert_close(values, corrected.select(axis, old.index(number)))
                staying += 1
            else:
                assert not values.any()
        assert state["step"] == 1
    assert staying


def _constant_gradient(optimizer, parameter, steps):
    """How far each step goes with the gradient 1, relative to the learning rate."""
    lengths = []
    for _ in range(steps):
        before = parameter.detach().clone()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        lengths.append((before - parameter.detach()) / optimizer.param_groups[0]["lr"])
    return torch.stack(lengths)


@pytest.mark.parametrize("fields", [{}, {"amsgrad": True}, {"betas": (0.8, 0.95)}], ids=str)
def test_fresh_rows_take_no_larger_steps_than_those_of_a_fresh_optimizer(fields):
    model, _, _ = _model("row")
    layer = _layers(model)[0]
    parameter = layer.parts("default")[0].parameter
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0, **fields)
    _constant_gradient(optimizer, parameter, 500)
    move = next(m for m in reselect(model, None, strategy="cycle") if m.parameter is parameter)
    stays = torch.arange(len(move.source)) == 0
    move.source[0] = 0
    move_optimizer_state(optimizer, [move])
    lengths = _constant_gradient(optimizer, parameter, 30)
    torch.testing.assert_close(lengths[:, stays], torch.ones_like(lengths[:, stays]), rtol=1e-3, atol=0)
    assert lengths[:, ~stays].max() <= 1.02  # with the count of the others it was 6
    assert lengths[5:, ~stays].min() > 0.9


def test_momentum_moves_as_it_is():
    model, inputs, _ = _model("row")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    _train(model, inputs, optimizer)
    layer = _layers(model)[0]
    first = layer.parts("default")[0]
    kept, old = optimizer.state[first.parameter]["momentum_buffer"].clone(), first.index.tolist()
    move_optimizer_state(optimizer, reselect(model, [inputs], strategy="gradient"))
    moved = optimizer.state[first.parameter]["momentum_buffer"]
    for values, number in zip(moved, layer.parts("default")[0].index.tolist(), strict=True):
        assert torch.equal(values, kept[old.index(number)] if number in old else torch.zeros_like(values))


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop", "NAdam", "Adafactor", "AdamW8bit"])
def test_state_that_cannot_be_told_by_row_begins_anew(name):
    model, inputs, _ = _model("row")
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "AdamW8bit":
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=1)
    else:
        optimizer = getattr(torch.optim, name)(trained, lr=1e-2)
    _train(model, inputs, optimizer)
    assert all(optimizer.state[parameter] for parameter in trained)
    move_optimizer_state(optimizer, reselect(model, None, strategy="cycle"))
    assert not any(optimizer.state.get(parameter) for parameter in trained)
    before = [parameter.detach().clone() for parameter in trained]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(trained, before, strict=True))


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
        (
            RocoftConfig(indices={"q_proj": [0, 1], "v_proj": [0, 1, 2, 3, 4]}),
            {"budget": 4},
            "reselection.budget is 4, below the 5",
        ),
        (RocoftConfig(r=1, indices=[0, 1, 2]), {"budget": 2}, "reselection.budget is 2, below the 3"),
        (None, {}, "reselection is for method rocoft; the adapter is of NoneType"),
    ],
)
def test_what_cannot_be_selected_anew_is_refused(config, settings, message):
    with pytest.raises(UserError, match=message):
        check_reselection(config, **{"strategy": "gradient", "budget": None, **settings})
