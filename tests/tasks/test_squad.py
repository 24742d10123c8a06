"""The measures of SQuAD, on cases worked out by hand from its scorers' rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks import best_threshold
from turnrow.tasks.squad import best_over, exact_match, normalize_answer, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat", "cat"),
        ("an apple a day", "apple day"),
        ("theatre and another anthem", "theatre and another anthem"),
        ("U.S.A.", "usa"),
        ("the-cat", "thecat"),  # punctuation goes first, so the article is no word of its own any more
        ("$1,000.50", "100050"),
        ("a.m.", "am"),
        ("The", ""),
        ("  \t\n ", ""),
        ("ÉCOLE, l'été", "école lété"),
        ("“the” – dash", "“ ” – dash"),  # of punctuation, that of ASCII alone
        ("猫が 座った", "猫が 座った"),
    ],
)
def test_case_punctuation_articles_and_blanks_do_not_count(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "exact"),
    [
        ("the Norman dynasty", "Norman Dynasty!", 1.0, 1.0),
        ("in the 10th century", "10th and 11th centuries", 2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4), 0.0),
        ("Denmark, Iceland and Norway", "Denmark, Iceland", 2 * (2 / 4) * 1 / (2 / 4 + 1), 0.0),
        ("to be or to be", "to be", 2 * (2 / 5) * 1 / (2 / 5 + 1), 0.0),  # a word counts as often as both have it
        ("Paris", "London", 0.0, 0.0),
        ("", "London", 0.0, 0.0),
        ("London", "", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "a", 1.0, 1.0),  # nothing is left of either
    ],
)
def test_a_prediction_is_scored_by_its_words(prediction: str, gold: str, f1: float, exact: float) -> None:
    assert token_f1(prediction, gold) == pytest.approx(f1)
    assert exact_match(prediction, gold) == exact


def test_the_best_of_several_gold_answers_counts() -> None:
    golds = ["Saint Bernadette Soubirous", "Bernadette", "the girl"]
    assert best_over(exact_match, "bernadette", golds) == 1.0
    assert best_over(token_f1, "Saint Bernadette", golds) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_without_a_gold_answer_silence_is_right() -> None:
    for golds in ([], ["the"], ["...", ""]):
        assert best_over(token_f1, "", golds) == 1.0
        assert best_over(token_f1, "Paris", golds) == 0.0
    assert best_over(exact_match, "", ["the", "Paris"]) == 0.0


def row(difference: float, answer: str, gold: Any) -> dict[str, Any]:
    return {"null_score_difference": difference, "best_answer": answer, "answers": gold}


def test_the_threshold_lies_between_what_is_answered_and_what_is_not() -> None:
    rows = [
        row(-3.0, "cat", {"text": ["cat"], "answer_start": [0]}),
        row(1.0, "dog", {"text": ["a dog"], "answer_start": [0]}),
        row(2.0, "bird", {"text": [], "answer_start": []}),
        row(5.0, "tree", {"text": [], "answer_start": []}),
    ]
    assert best_threshold(rows) == (1.5, 1.0)
    assert best_threshold(rows[:2]) == (2.0, 1.0)
    assert best_threshold(rows[2:], metric="exact_match") == (1.0, 1.0)
    assert (
        best_threshold([{**r, "gold": r["answers"]["text"], "answers": None} for r in rows], answers="gold")[0] == 1.5
    )


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from(["cat", "red cat"]), st.sampled_from([[], ["cat"]])), min_size=1
    )
)
def test_no_threshold_is_better_than_the_chosen_one(drawn: list[tuple[int, str, list[str]]]) -> None:
    rows = [row(float(difference), answer, gold) for difference, answer, gold in drawn]

    def score(threshold: float) -> float:
        said = ["" if r["null_score_difference"] > threshold else r["best_answer"] for r in rows]
        return float(np.mean([best_over(token_f1, text, r["answers"]) for text, r in zip(said, rows, strict=True)]))

    threshold, promised = best_threshold(rows)
    assert score(threshold) == pytest.approx(promised)
    assert promised >= max(score(other) for other in np.arange(-4.5, 5, 0.5)) - 1e-12


def test_rows_from_which_no_threshold_can_be_chosen_are_refused() -> None:
    with pytest.raises(UserError, match="by f1 or exact_match, got 'accuracy'"):
        best_threshold([row(0, "", [])], metric="accuracy")
    with pytest.raises(UserError, match="by rows with gold answers, and there are none"):
        best_threshold([])
    with pytest.raises(UserError, match="row 2 has no 'null_score_difference'; .* whose questions may have no answer"):
        best_threshold([row(0, "", []), {"answers": []}])
    with pytest.raises(UserError, match="row 1 has no 'answers'"):
        best_threshold([row(0, "", None)])
