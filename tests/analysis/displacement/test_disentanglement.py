"""Angles alone and magnitudes alone: what the first layer keeps, and what can be told by it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertModel

from turnrow.analysis.displacement import (
    DisentangledHead,
    Labelled,
    disentangle,
    fit_head,
    pool_states,
    sentence_states,
)
from turnrow.errors import UserError

X = torch.tensor([[3.0, 4.0]])
W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, -4.0]])
FIRST_LAYER = {"ordinary": [3, 8, -25], "angle": [0.6, 0.8, -1], "magnitude": [5, 10, 25]}


@pytest.mark.parametrize("part", FIRST_LAYER)
def test_golden_first_layer(part) -> None:
    head = DisentangledHead(2, 3, 1, part)
    with torch.no_grad():
        head.weight.copy_(W)
    assert head.first_layer(X)[0].tolist() == pytest.approx(FIRST_LAYER[part])


def test_the_ordinary_layer_is_the_product_of_the_two_others() -> None:
    torch.manual_seed(0)
    x, heads = torch.randn(5, 4), {part: DisentangledHead(4, 3, 1, part) for part in FIRST_LAYER}
    for head in heads.values():
        head.load_state_dict(heads["ordinary"].state_dict())
    z = {part: head.first_layer(x) for part, head in heads.items()}
    torch.testing.assert_close(z["angle"] * z["magnitude"], z["ordinary"])


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    return float((predicted.argmax(-1) == labels).double().mean())


def splits(what: str) -> list[Labelled]:
    """In the plane, whether a vector is long, or whether it points to the right."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in (200, 100, 100):
        angle, length = 2 * math.pi * torch.rand(n, generator=generator), 1 + 2 * torch.rand(n, generator=generator)
        labels = (length > 2) if what == "length" else (angle.cos() > 0)
        found.append(Labelled(length[:, None] * torch.stack((angle.cos(), angle.sin()), 1), labels.long()))
    return found


@pytest.mark.parametrize(
    ("what", "right", "wrong"), [("length", "magnitude", "angle"), ("angle", "angle", "magnitude")]
)
def test_each_part_tells_what_lies_in_it_and_nothing_else(what, right, wrong) -> None:
    scores = {
        part: disentangle(*splits(what), part, accuracy, rates=(1e-2, 1e-1), seeds=(0,), hidden=16).scores[0]
        for part in (right, wrong)
    }
    assert scores[right] > 0.95
    assert scores[wrong] < 0.65


def test_the_rate_is_chosen_on_validation_and_the_test_split_decides_nothing() -> None:
    train, validation, test = splits("angle")
    turned_over = Labelled(test.states, 1 - test.labels)
    settings = {"rates": (1e-6, 1e-1), "seeds": (0, 1), "hidden": 8}
    found = disentangle(train, validation, turned_over, "angle", accuracy, **settings)
    assert found.learning_rate == 1e-1
    assert found.rates[1e-1] > 0.9 > found.rates[1e-6]
    assert list(found.scores) == [0, 1]
    assert all(score < 0.1 for score in found.scores.values())


def test_numbers_are_told_by_regression() -> None:
    train = splits("length")[0]
    data = Labelled(train.states, torch.linalg.vector_norm(train.states, dim=-1))
    head = fit_head(data, "magnitude", learning_rate=1e-1, hidden=16)
    assert head(data.states).shape == (200, 1)
    assert torch.nn.functional.mse_loss(head(data.states)[:, 0], data.labels) < 0.01


def test_the_same_seed_trains_the_same_head_and_leaves_the_global_seed_alone() -> None:
    data = splits("angle")[0]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other, third = (fit_head(data, "angle", learning_rate=1e-2, epochs=1, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(state, torch.get_rng_state())


def test_states_of_texts_leave_padding_out() -> None:
    states = torch.arange(12.0).view(1, 4, 3)
    for mask, (first, last) in {(1, 1, 1, 0): (0, 2), (0, 1, 1, 1): (1, 3)}.items():
        batch = {"attention_mask": torch.tensor([mask])}
        assert torch.equal(pool_states(states, batch, "first"), states[:, first])
        assert torch.equal(pool_states(states, batch, "last"), states[:, last])
        assert torch.equal(pool_states(states, batch, "mean"), states[:, first : last + 1].mean(1))


def test_sentence_states_are_those_of_the_layer_asked_for() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    found = sentence_states(model, [batch, batch], "last", layer=0)
    assert model.training
    model.eval()
    assert torch.equal(found[1], model(**batch, output_hidden_states=True).hidden_states[0][1, 1])
    assert found.shape == (4, 8)
    with pytest.raises(UserError, match="layer is 2, but there are hidden states 0 to 1"):
        sentence_states(model, [batch], layer=2)
    with pytest.raises(UserError, match="no texts"):
        sentence_states(model, [])


def test_unknown_names_list_what_is_allowed() -> None:
    with pytest.raises(UserError, match="part is 'angles'; it must be one of ordinary, angle, magnitude; did you mean"):
        DisentangledHead(2, 2, 1, "angles")
    with pytest.raises(
        UserError, match="pooling is 'frist'; it must be one of first, last, mean; did you mean 'first'"
    ):
        pool_states(torch.zeros(1, 1, 1), {}, "frist")
    with pytest.raises(UserError, match="at least one learning rate and one seed"):
        disentangle(*splits("angle"), "angle", accuracy, rates=())
