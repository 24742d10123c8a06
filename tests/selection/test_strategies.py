from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.selection import STRATEGIES, Strategy, check_strategy, choose, choose_by_score, needs_data

FREE = [s for s in STRATEGIES if not needs_data(s)]
BY_SCORE = [s for s in STRATEGIES if needs_data(s)]


def test_names_are_those_of_the_type():
    assert get_args(Strategy) == STRATEGIES
    assert FREE == ["first", "last", "uniform", "random"]


@pytest.mark.parametrize(
    ("strategy", "count", "chosen"),
    [
        ("first", 3, [0, 1, 2]),
        ("last", 3, [7, 8, 9]),
        ("uniform", 1, [4]),
        ("uniform", 2, [0, 9]),
        ("uniform", 3, [0, 5, 9]),
        ("uniform", 4, [0, 3, 6, 9]),
        ("uniform", 10, list(range(10))),
    ],
)
def test_numbers_of_ten(strategy, count, chosen):
    assert choose(strategy, 10, count).tolist() == chosen


@pytest.mark.parametrize(
    ("strategy", "count", "chosen"),
    [
        ("wanda_max", 2, [2, 4]),
        ("gradient", 3, [1, 2, 4]),
        ("fisher", 1, [2]),
        ("wanda_min", 2, [0, 3]),
        ("wanda_mixed", 1, [2]),
        ("wanda_mixed", 2, [0, 2]),
        ("wanda_mixed", 3, [0, 2, 4]),
        ("wanda_mixed", 4, [0, 2, 3, 4]),
        ("wanda_mixed", 5, [0, 1, 2, 3, 4]),
    ],
)
def test_scores_of_five(strategy, count, chosen):
    scores = torch.tensor([0.0, 3.0, 9.0, 1.0, 5.0])
    assert choose_by_score(strategy, scores, count).tolist() == chosen


@pytest.mark.parametrize(
    ("strategy", "chosen"), [("wanda_max", [0, 1, 2]), ("wanda_min", [0, 1, 2]), ("wanda_mixed", [0, 1, 2])]
)
def test_of_equal_scores_the_lower_number_wins(strategy, chosen):
    assert choose_by_score(strategy, torch.ones(6), 3).tolist() == chosen
    # one score decides, the rest are ties
    assert 4 in choose_by_score(strategy, torch.tensor([1.0, 1, 1, 1, 2 if strategy != "wanda_min" else 0, 1]), 2)


@given(
    strategy=st.sampled_from(BY_SCORE),
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    data=st.data(),
)
def test_a_choice_by_score_equals_a_stable_sort(strategy, scores, data):
    count = data.draw(st.integers(1, len(scores)))
    falling = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    rising = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    if strategy == "wanda_min":
        expected = rising[:count]
    elif strategy == "wanda_mixed":
        top = falling[: (count + 1) // 2]
        expected = top + [i for i in rising if i not in top][: count // 2]
    else:
        expected = falling[:count]
    chosen = choose_by_score(strategy, torch.tensor(scores, dtype=torch.float64), count)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(expected)


@given(strategy=st.sampled_from(FREE), size=st.integers(1, 50), data=st.data())
def test_a_choice_is_of_different_numbers_in_ascending_order(strategy, size, data):
    count = data.draw(st.integers(1, size))
    chosen = choose(strategy, size, count, seed=data.draw(st.integers(0, 3)), module="m")
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()) & set(range(size)))
    assert len(chosen) == count


def test_random_depends_on_seed_module_and_part_and_on_nothing_else():
    def draw(**changes):
        return choose("random", 1000, 5, **{"seed": 0, "module": "layers.0.q", "part": "row"} | changes).tolist()

    torch.manual_seed(1)
    once = draw()
    torch.manual_seed(2)
    assert draw() == once
    others = [draw(seed=1), draw(module="layers.1.q"), draw(part="column")]
    assert all(other != once for other in others)


def test_random_is_the_same_in_every_process():
    assert choose("random", 1000, 5, seed=3, module="m").tolist() == [14, 204, 398, 453, 512]


def test_every_set_of_random_numbers_is_about_as_likely():
    drawn = [tuple(choose("random", 4, 2, module=str(i)).tolist()) for i in range(600)]
    counts = {pair: drawn.count(pair) for pair in set(drawn)}
    assert len(counts) == 6
    assert all(60 < count < 140 for count in counts.values())


def test_an_unknown_strategy_lists_the_allowed_with_near_matches():
    with pytest.raises(
        UserError, match="selection is 'gradients'; it must be one of 'first', .*'fisher'; did you mean 'gradient'"
    ):
        check_strategy("gradients")
    with pytest.raises(UserError, match="method.selection is 3; it must be one of"):
        check_strategy(3, "method.selection")


@pytest.mark.parametrize("strategy", BY_SCORE)
def test_a_strategy_that_needs_data_says_how_to_give_it(strategy):
    with pytest.raises(UserError, match=f"selection '{strategy}' needs data, and module 'm' .*turnrow.select"):
        choose(strategy, 4, 2, module="m")


@pytest.mark.parametrize("count", [0, 5])
def test_more_than_there_are_is_refused(count):
    message = f"{count} columns are to be chosen in module 'm', which has 4"
    with pytest.raises(UserError, match=message):
        choose("last", 4, count, module="m", part="column")
    with pytest.raises(UserError, match=message):
        choose_by_score("fisher", torch.ones(4), count, module="m", part="column")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_the_module(value):
    with pytest.raises(UserError, match=f"fisher score of row 2 of module 'm' is {value}, and 1 of 4 are not finite"):
        choose_by_score("fisher", torch.tensor([0, 1, value, 2]), 2, module="m")
