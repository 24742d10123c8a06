"""Lengths and directions by hand; running numbers against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turnrow.analysis.displacement import RunningNumbers, angular_change, magnitude_change, turn
from turnrow.errors import UserError


def test_golden_changes_of_vectors_in_the_plane() -> None:
    x0 = torch.tensor([[1.0, 0], [1, 0], [3, 4], [1, 0], [1, 1]])
    x = torch.tensor([[0.0, 1], [3, 0], [6, 8], [-1, 0], [1, 0]])
    assert magnitude_change(x, x0).tolist() == pytest.approx([0, 2, 1, 0, 1 - 1 / math.sqrt(2)])
    assert angular_change(x, x0).tolist() == pytest.approx([0, 1, 1, -1, 1 / math.sqrt(2)])
    assert turn(x, x0).tolist() == pytest.approx([1, 0, 0, 2, 1 - 1 / math.sqrt(2)])


def test_a_small_turn_is_not_lost_in_float32() -> None:
    x0, x = torch.tensor([1.0, 0]), torch.tensor([1.0, 1e-5])
    assert torch.cosine_similarity(x, x0, dim=0) == 1
    assert turn(x, x0).item() == pytest.approx(0.5e-10, rel=1e-6)


def test_a_state_of_zero_length_has_neither() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert magnitude_change(one, zero).isnan()
    assert turn(one, zero).isnan()
    assert turn(zero, one).isnan()
    assert magnitude_change(zero, one) == 1


def test_running_numbers_are_those_of_numpy_however_they_come() -> None:
    values = np.random.default_rng(0).lognormal(-3, 2, 5_000)
    values[:1_000] = 0
    running = RunningNumbers()
    for part in np.split(values, [1, 7, 7, 2_000]):
        running.add(torch.from_numpy(part))
    found = running.summary()
    assert found.count == 5_000
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.std == pytest.approx(values.std(), rel=1e-12)
    assert (found.least, found.greatest) == (0, values.max())
    assert found.quantiles[0.05] == 0
    for share, quantile in found.quantiles.items():
        assert quantile == pytest.approx(np.quantile(values, share, method="lower"), rel=0.01)


@given(st.lists(st.floats(1e-11, 1e5), min_size=1, max_size=20), st.floats(0, 1))
def test_a_quantile_is_within_one_percent(values: list[float], share: float) -> None:
    running = RunningNumbers()
    running.add(torch.tensor(values, dtype=torch.float64))
    exact = np.quantile(values, share, method="lower")
    assert running.summary([share]).quantiles[share] == pytest.approx(exact, rel=0.0101)


def test_nothing_cannot_be_summarized() -> None:
    running = RunningNumbers()
    running.add(torch.zeros(0))
    with pytest.raises(UserError, match="no numbers to summarize"):
        running.summary()
