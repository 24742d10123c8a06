"""A variable that lies in a known direction is found there, and nowhere else; a trained map finds it where it was hidden.

The model is made by hand. It reads two bits, a and b, each 1 or -1, writes them into a state of four numbers h = Q (a, b, 0, 0), and says
whether they are equal: the sign of a b. If a is taken from another input, it should say the sign of a' b.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from turnrow.analysis.interchange import (
    BlockRotation,
    Counterfactual,
    Dense,
    Identity,
    Interchange,
    Intervention,
    Orthogonal,
    Part,
    Site,
    align,
    interchange_accuracy,
    logits_of,
)
from turnrow.errors import UserError


class Equal(nn.Module):
    def __init__(self, q: Tensor) -> None:
        super().__init__()
        self.state = nn.Linear(2, 4, bias=False)
        self.state.weight = nn.Parameter(q[:, :2].clone())
        self.q = q

    def forward(self, bits: Tensor) -> Tensor:
        a, b = (self.state(bits) @ self.q)[..., :2].unbind(-1)
        return torch.stack((-a * b, a * b), dim=-1)  # different, equal


def turned(by: float) -> Tensor:
    """Each pair of neighbours turned."""
    c, s = math.cos(by), math.sin(by)
    return torch.block_diag(*[torch.tensor([[c, -s], [s, c]])] * 2)


def cases(variable: int) -> list[Counterfactual]:
    """All pairs of inputs, and what should be said if the variable had the value that it has in the source."""
    inputs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=2)))
    pairs = list(itertools.product(range(4), repeat=2))
    base, source = inputs[[b for b, _ in pairs]], inputs[[s for _, s in pairs]]
    mixed = base.clone()
    mixed[:, variable] = source[:, variable]
    return [Counterfactual({"bits": base}, ({"bits": source},), (mixed.prod(1) > 0).long())]


def accuracy(model: Equal, r: nn.Module, rows: list[int], variable: int = 0) -> float:
    interchange = Interchange(model, [Intervention(Site("state"), r, (Part(rows=rows),))])
    return interchange_accuracy(interchange, cases(variable))


def test_the_model_says_what_is_equal() -> None:
    said = Equal(turned(0.7))(torch.tensor([[1.0, 1], [1, -1], [-1, -1]])).argmax(-1)
    assert said.tolist() == [1, 0, 1]


def test_a_variable_in_a_feature_of_its_own() -> None:
    model = Equal(torch.eye(4))
    assert accuracy(model, Identity(4), [0], variable=0) == 1.0
    assert accuracy(model, Identity(4), [1], variable=1) == 1.0
    assert accuracy(model, Identity(4), [1], variable=0) == 0.5
    assert accuracy(model, Identity(4), [2, 3], variable=0) == 0.5


def test_a_variable_in_a_known_rotated_direction() -> None:
    q = turned(0.7)
    model = Equal(q)
    assert accuracy(model, Dense(q.T), [0]) == 1.0
    assert accuracy(model, Dense(q.T), [1]) == 0.5
    assert accuracy(model, BlockRotation(torch.tensor([-0.7, -0.7]), torch.tensor([1.0, 1])), [0]) == 1.0
    # Scales do not matter to what a row holds, if it is the inverse that leads back.
    assert accuracy(model, BlockRotation(torch.tensor([-0.7, -0.7]), torch.tensor([3.0, 0.2])), [0]) == 1.0
    assert accuracy(Equal(turned(math.pi / 4)), Identity(4), [0]) < 1.0


@pytest.mark.parametrize("kind", ["orthogonal", "blocks"])
def test_a_trained_rotation_finds_the_variable(kind) -> None:
    if kind == "orthogonal":
        q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(7)))[0]
        r = Orthogonal(4, seed=1)
    else:
        q, r = turned(1.2), BlockRotation.start(4)
        r.alpha.requires_grad_(False)
    model = Equal(q)
    before = [parameter.clone() for parameter in model.parameters()]
    interchange = Interchange(model, [Intervention(Site("state"), r, (Part(rows=[0]),))])
    assert interchange_accuracy(interchange, cases(0)) < 0.9
    losses = align(interchange, cases(0), learning_rate=0.05, epochs=80)
    assert losses[-1] < losses[0] / 2
    assert interchange_accuracy(interchange, cases(0)) == 1.0
    with torch.no_grad():
        row = r.into(torch.eye(4)).T[0]
        assert abs(float(row @ q[:, 1])) < 0.1  # b is left alone
        assert abs(float(row @ q[:, 0])) > 0.9 or kind == "orthogonal"  # two features are free in the other
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_are_those_after_the_last_token() -> None:
    logits = torch.arange(12.0).view(2, 3, 2)
    mask = {"attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])}
    assert logits_of({"logits": logits}, mask).tolist() == [[2, 3], [10, 11]]
    assert logits_of(logits[:, 0], mask).tolist() == [[0, 1], [6, 7]]


def test_nothing_to_train_or_to_judge_is_refused() -> None:
    interchange = Interchange(Equal(torch.eye(4)), [Intervention(Site("state"), Identity(4))])
    with pytest.raises(UserError, match="none of the maps has anything to train"):
        align(interchange, cases(0))
    with pytest.raises(UserError, match="no cases"):
        interchange_accuracy(interchange, [])
    trained = Interchange(Equal(torch.eye(4)), [Intervention(Site("state"), Orthogonal(4))])
    with pytest.raises(UserError, match="no cases"):
        align(trained, [])
