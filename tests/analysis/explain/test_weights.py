"""Norms, singular values and ranks by hand and against torch; which rows moved; how far pairs were turned."""

from __future__ import annotations

import math

import pytest
import torch

from turnrow.analysis.explain import Turning, effective_rank, measure, singular_values
from turnrow.ops import pairs


def test_golden_diagonal() -> None:
    found = measure("w", torch.diag(torch.tensor([3.0, -4.0])), torch.diag(torch.tensor([6.0, 8.0])), shape=(2, 2))
    assert found.singular_values == pytest.approx([4, 3])
    assert (found.norm, found.relative, found.spectral) == pytest.approx((5, 0.5, 4))
    assert found.stable_rank == pytest.approx(25 / 16)
    shares = 4 / 7, 3 / 7
    assert found.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_golden_effective_ranks() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_factors_and_their_product_measure_the_same() -> None:
    torch.manual_seed(0)
    b, a, weight = torch.randn(9, 3), torch.randn(3, 7), torch.randn(9, 7)
    by_factors, by_product = measure("w", (b, a), weight), measure("w", b @ a, weight)
    exact = torch.linalg.svdvals((b @ a).double())
    assert by_factors.singular_values == pytest.approx(exact[:3].tolist(), rel=1e-6)
    assert len(by_product.singular_values) == 7
    for name in ("norm", "relative", "spectral", "stable_rank"):
        assert getattr(by_factors, name) == pytest.approx(getattr(by_product, name), rel=1e-5)
    assert by_factors.effective_rank == pytest.approx(by_product.effective_rank, rel=1e-3)
    wide = torch.randn(3, 8), torch.randn(8, 4)  # as many factors as rows, or more
    torch.testing.assert_close(singular_values(wide)[0].float(), torch.linalg.svdvals(wide[0] @ wide[1]))


def test_of_a_large_weight_the_greatest_are_known_and_the_norm_of_all(monkeypatch) -> None:
    from turnrow.analysis.explain import weights

    monkeypatch.setattr(weights, "_EXACT", 50)
    monkeypatch.setattr(weights, "_LISTED", 6)
    torch.manual_seed(0)
    delta = torch.randn(60, 4) @ torch.randn(4, 80) + 1e-3 * torch.randn(60, 80)
    state = torch.get_rng_state()
    found = measure("w", delta)
    assert torch.equal(state, torch.get_rng_state())
    assert len(found.singular_values) == 6
    assert found.singular_values[:4] == pytest.approx(torch.linalg.svdvals(delta)[:4].tolist(), rel=1e-4)
    assert found.norm == pytest.approx(torch.linalg.matrix_norm(delta).item(), rel=1e-6)
    assert found.effective_rank is None


def test_a_bias_and_no_change_at_all() -> None:
    found = measure("b", torch.tensor([3.0, 4.0]), torch.tensor([0.0, 10.0]), shape=(2,))
    assert (found.norm, found.relative, found.spectral, found.stable_rank) == pytest.approx((5, 0.5, 5, 1))
    assert not found.is_matrix
    still = measure("w", torch.zeros(2, 2), torch.zeros(2, 2))
    assert (still.norm, still.relative, still.stable_rank, still.effective_rank) == (0, None, 0, 0)


@pytest.mark.parametrize("part", ["row", "column"])
def test_golden_rows_that_moved(part) -> None:
    delta, weight = torch.zeros(3, 4), torch.full((3, 4), 2.0)
    delta[1], delta[2] = torch.tensor([3.0, 4, 0, 0]), torch.tensor([0.0, 0, 0, 1])
    delta, weight = (t if part == "row" else t.T for t in (delta, weight))
    found = measure("w", delta, weight, parts={part: torch.tensor([2, 1])}).parts[part]
    assert (found.count, found.indices, found.norms) == (2, [1, 2], [5, 1])
    assert found.relative == pytest.approx([5 / 4, 1 / 4])
    assert measure("w", delta, parts={part: torch.tensor([2, 1])}).parts[part].relative is None


def test_golden_entries_that_moved() -> None:
    delta = torch.tensor([[0.0, -3], [1, 0]])
    found = measure("w", delta, torch.ones(2, 2) * 2, parts={"entry": torch.tensor([1, 2])}).parts["entry"]
    assert (found.indices, found.norms, found.relative) == ([1, 2], [3, 1], [1.5, 0.5])


def test_golden_turns() -> None:
    theta = torch.tensor([0.0, 0.1, -0.3, 0.2])
    alpha = torch.tensor([1.0, 2.0, 1.0, 0.5])
    found = measure("w", None, blocks=pairs.coefficients("road_1", 2, theta, alpha))
    assert found.norm is None
    turning = found.turning
    assert turning is not None
    assert (turning.count, turning.moved, turning.reflections) == (4, 3, 0)
    assert turning.angle == pytest.approx({0.05: 0, 0.5: 0.2, 0.95: 0.3, 1.0: 0.3})
    assert turning.scale == pytest.approx({0.0: 0.5, 0.05: 0.5, 0.5: 1, 0.95: 2, 1.0: 2})


def test_a_block_that_turns_a_pair_over_is_counted() -> None:
    flip = pairs.coefficients("road_2", 2, torch.tensor([0.0, torch.pi]), torch.ones(2))  # [[1, 0], [0, -1]]
    assert Turning.of(flip).reflections == 1
