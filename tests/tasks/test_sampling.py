from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks import FEW_SHOT_SEEDS, draw_few_shot, make_task, read_table

TASK = make_task("classification", text=["sentence"], label="label")


def data(size: int = 60, classes: int = 3) -> Dataset:
    return Dataset.from_list([{"id": n, "sentence": f"text {n}", "label": n % classes} for n in range(size)])


@pytest.mark.parametrize("seed", FEW_SHOT_SEEDS)
def test_k_of_each_class_are_drawn_and_none_twice(seed: int) -> None:
    train, validation = draw_few_shot(data(), TASK, 4, seed, validation=True)
    assert validation is not None
    assert train["label"][:] == validation["label"][:] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({*train["id"], *validation["id"]}) == 24
    alone, nothing = draw_few_shot(data(), TASK, 4, seed)
    assert (alone["id"][:], nothing) == (train["id"][:], None)


def test_the_draw_is_that_of_the_hashes() -> None:
    """Worked out anew, so that it can never change unnoticed."""
    digests = {n: hashlib.sha256(f'13:"text {n}"'.encode()).hexdigest() for n in range(60)}
    train, _ = draw_few_shot(data(), TASK, 2, 13)
    assert train["id"][:] == [n for c in range(3) for n in sorted(range(c, 60, 3), key=digests.__getitem__)[:2]]
    assert train["id"][:] == [21, 36, 10, 28, 50, 26]


def test_other_seeds_give_other_draws() -> None:
    drawn = {tuple(draw_few_shot(data(), TASK, 4, seed)[0]["id"]) for seed in FEW_SHOT_SEEDS}
    assert len(drawn) == len(FEW_SHOT_SEEDS)


@given(st.integers(0, 99), st.randoms(use_true_random=False))
def test_neither_the_order_of_the_rows_nor_other_columns_matter(seed: int, order: random.Random) -> None:
    rows = [{"sentence": f"text {n % 40}", "label": n % 2 if n != 41 else 0} for n in range(44)]
    shuffled = [{**row, "idx": n, "label": str(row["label"])} for n, row in enumerate(rows)]
    order.shuffle(shuffled)
    there, here = (draw_few_shot(Dataset.from_list(r), TASK, 5, seed, validation=True) for r in (rows, shuffled))
    assert [split["sentence"][:] for split in there] == [split["sentence"][:] for split in here]  # type: ignore[index]


def test_repeated_rows_count_once_and_contradicting_ones_not_at_all() -> None:
    rows = [("a", 0), ("a", 0), ("b", 0), ("c", 0), ("c", 1), ("d", 1), ("e", 1)]
    table = Dataset.from_list([{"sentence": text, "label": label} for text, label in rows])
    for seed in range(20):
        train, validation = draw_few_shot(table, TASK, 1, seed, validation=True)
        assert {*train["sentence"], *validation["sentence"]} == {"a", "b", "d", "e"}  # type: ignore[index]
    with pytest.raises(
        UserError, match="3 different rows of each class are needed, but there are 2 of class '0', 2 of class '1'"
    ):
        draw_few_shot(table, TASK, 3, 0)


def test_too_few_rows_are_counted_by_class() -> None:
    with pytest.raises(
        UserError,
        match=r"split 'train': 40 different rows of each class are needed \(20 to train on, 20 for validation\), but there are "
        "20 of class '0', 20 of class '1', 20 of class '2'; lower few_shot.k",
    ):
        draw_few_shot(data(), TASK, 20, 13, validation=True)
    rare = Dataset.from_list([*data(20, 2), {"id": 20, "sentence": "rare", "label": 9}])
    with pytest.raises(UserError, match="but there are 1 of class '9'; lower"):
        draw_few_shot(rare, TASK, 2, 13)


def test_a_split_of_one_class_is_drawn_from_as_it_is() -> None:
    train, _ = draw_few_shot(data(10, 1), TASK, 3, 13)
    assert train["label"][:] == [0, 0, 0]


def test_a_task_without_classes_is_refused() -> None:
    task = make_task("regression", text="sentence")
    with pytest.raises(UserError, match="drawn by class, and the task 'regression' has no classes"):
        draw_few_shot(data(), task, 3, 13)


def test_missing_columns_and_labels_are_named() -> None:
    with pytest.raises(UserError, match="split 'train' has no column 'label'"):
        draw_few_shot(data().remove_columns("label"), TASK, 3, 13)
    nameless = Dataset.from_list([{"sentence": "a", "label": None}, {"sentence": "b", "label": 1}])
    with pytest.raises(UserError, match="row 1: column 'label' has no value"):
        draw_few_shot(nameless, TASK, 1, 13)


@pytest.mark.parametrize(("name", "classes"), [("trec", 6), ("mnli", 3), ("subj", 2)])
def test_real_data_have_16_of_each_class(real_data: Callable[[str, str], Path], name: str, classes: int) -> None:
    task = make_task(name)
    whole = task.in_our_form(read_table(real_data(name, "train")))
    drawn: dict[int, Any] = {}
    for seed in FEW_SHOT_SEEDS:
        train, validation = draw_few_shot(whole, task, 16, seed, validation=True)
        assert validation is not None
        assert len(train) == len(validation) == 16 * classes
        texts = [
            {tuple(row[column] for column in task.input_columns()) for row in split} for split in (train, validation)
        ]
        assert not texts[0] & texts[1]
        drawn[seed] = texts[0]
    assert max(len(drawn[13] & drawn[seed]) for seed in FEW_SHOT_SEEDS[1:]) < 8 * classes
