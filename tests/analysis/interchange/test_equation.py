"""DII by hand, in two to four dimensions; maps and their inverses; RoAd as an intervention."""

from __future__ import annotations

import math

import pytest
import torch

from turnrow.analysis.interchange import (
    BlockRotation,
    Dense,
    Identity,
    Map,
    Orthogonal,
    dii,
    exchanged,
    road_intervention,
)
from turnrow.errors import UserError

B = torch.tensor([1.0, 2, 3, 4])
S = torch.tensor([10.0, 20, 30, 40])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(None, [10, 20, 30, 40]), ([0], [10, 2, 3, 4]), (":50%", [10, 20, 3, 4]), ("1::2", [1, 20, 3, 40])],
)
def test_golden_features_are_exchanged(rows, expected) -> None:
    assert dii(B, S, Identity(4), rows).tolist() == expected


def test_golden_sum_and_difference() -> None:
    """Coordinates (x + y, x - y): the base keeps its difference, -1, and takes the sum of the source, 30."""
    r = Dense(torch.tensor([[1.0, 1], [1, -1]]))
    b, s = torch.tensor([1.0, 2]), torch.tensor([10.0, 20])
    assert dii(b, s, r, [0]).tolist() == [14.5, 15.5]
    assert dii(b, s, r, [1]).tolist() == [-3.5, 6.5]
    orthogonal = Dense(torch.tensor([[1.0, 1], [1, -1]]) / math.sqrt(2))
    torch.testing.assert_close(dii(b, s, orthogonal, [0]), torch.tensor([14.5, 15.5]))


def test_golden_map_that_is_no_rotation_needs_its_inverse() -> None:
    r = Dense(torch.tensor([[2.0, 0], [1, 1]]))  # coordinates 2 x and x + y
    b, s = torch.tensor([1.0, 2]), torch.tensor([10.0, 20])
    assert dii(b, s, r, [0]).tolist() == [10, -7]  # 2 x = 20 from the source, x + y = 3 kept
    with_transpose = b + r.matrix.T @ (torch.tensor([1.0, 0]) * (r.into(s) - r.into(b)))
    assert with_transpose.tolist() != [10, -7]


def test_golden_quarter_turn_of_pairs() -> None:
    r = BlockRotation(torch.tensor([math.pi / 2, 0.0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(r.into(B), torch.tensor([-4.0, 2, 3, 4]))
    torch.testing.assert_close(r.back(torch.tensor([-4.0, 2, 3, 4])), B)
    assert r.rows([0]) == [0, 1]
    assert BlockRotation.start(8, group_size=4).rows([1, 2]) == [1, 3, 4, 6]
    torch.testing.assert_close(dii(B, S, r, r.rows([1])), torch.tensor([1.0, 2, 30, 40]))
    torch.testing.assert_close(dii(B, S, r, [0]), torch.tensor([1.0, 20, 3, 4]))


def maps() -> dict[str, Map]:
    torch.manual_seed(0)
    road = {
        f"road_{n}": BlockRotation(
            torch.randn(n * 4 if n > 1 else 4),
            1 + 0.2 * torch.rand(n * 4 if n > 1 else 4),
            variant=f"road_{n}",
            group_size=4,
        )
        for n in (1, 2)
    }
    dense = Dense(torch.randn(8, 8, dtype=torch.float64) + 3 * torch.eye(8))
    return {
        **road,
        "dense": dense,
        "orthogonal": Orthogonal(8, dtype=torch.float64),
        "inverse": dense.inverse(),
        "identity": Identity(8),
    }


@pytest.mark.parametrize("name", maps())
def test_back_undoes_into_and_parts_add_up(name) -> None:
    r = maps()[name].double()
    b, s, t = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(r.back(r(b)), b)
    torch.testing.assert_close(dii(b, s, r), s)
    torch.testing.assert_close(dii(b, b, r, [1, 2]), b)
    once = exchanged(b, [(s, [0, 3]), (t, "4:6")], r)
    torch.testing.assert_close(dii(dii(b, s, r, [0, 3]), t, r, "4:6"), once)
    torch.testing.assert_close(exchanged(b, [(s, ":50%"), (s, "50%:")], r), s)
    z = r.into(once)
    torch.testing.assert_close(z[:, [0, 3]], r.into(s)[:, [0, 3]])
    torch.testing.assert_close(z[:, [1, 2, 6, 7]], r.into(b)[:, [1, 2, 6, 7]])


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_road_is_an_intervention_and_the_transpose_will_not_do(alpha) -> None:
    theta = torch.tensor([0.3, -1.1])
    r = BlockRotation(theta, torch.full((2,), alpha)).double()
    h = B.double()
    with torch.no_grad():
        torch.testing.assert_close(road_intervention(h, r), r.into(h))
        torch.testing.assert_close(dii(h, r.into(h), r.inverse()), r.into(h))
        matrix = r.into(torch.eye(4, dtype=torch.float64)).T
        as_printed = h + matrix @ (h - matrix.T @ h)
    assert torch.allclose(as_printed, r.into(h)) == (alpha == 1)


def test_an_orthogonal_map_stays_one_while_it_is_trained() -> None:
    r = Orthogonal(5, seed=3)
    assert torch.equal(Orthogonal(5, seed=None).matrix.detach(), torch.eye(5))
    assert not torch.equal(Orthogonal(5, seed=4).matrix, r.matrix)
    optimizer = torch.optim.SGD(r.parameters(), lr=0.1)
    before = r.matrix.detach().clone()
    for _ in range(3):
        r.into(torch.randn(7, 5)).pow(4).mean().backward()
        optimizer.step()
    assert not torch.allclose(before, r.matrix)
    torch.testing.assert_close(r.matrix @ r.matrix.T, torch.eye(5))


def test_states_keep_their_dtype() -> None:
    r = Orthogonal(4)
    assert dii(B.bfloat16(), S.bfloat16(), r, [0]).dtype == torch.bfloat16
    assert dii(B.double(), S.double(), BlockRotation.start(4), [0]).dtype == torch.float64


def test_bad_maps_and_parts_are_refused() -> None:
    with pytest.raises(UserError, match=r"the map is \[2, 3\]; it must be square"):
        Dense(torch.zeros(2, 3))
    with pytest.raises(UserError, match="singular"):
        Dense(torch.ones(2, 2))
    with pytest.raises(UserError, match="cannot be undone"):
        BlockRotation(torch.zeros(2), torch.tensor([1.0, 0]))
    with pytest.raises(UserError, match="variant is 'road1'; it must be one of road_1, road_2, road_4; did you mean"):
        BlockRotation(torch.zeros(2), torch.ones(2), variant="road1")
    with pytest.raises(UserError, match="must be of one length"):
        BlockRotation(torch.zeros(2), torch.ones(3))
    with pytest.raises(UserError, match="3 angles of road_1 make no whole groups of 4 features"):
        BlockRotation(torch.zeros(3), torch.ones(3), group_size=4)
    with pytest.raises(UserError, match="part 1 and one before it both exchange row 2 of the map"):
        exchanged(B, [(S, [0, 2]), (S, "2:")], Identity(4))
    with pytest.raises(UserError, match="rows of part 0 contains 4, which is out of range: there are 4 rows"):
        dii(B, S, Identity(4), [4])
    with pytest.raises(UserError, match="the states have 4 features, the map is one of 3"):
        dii(B, S, Identity(3))
