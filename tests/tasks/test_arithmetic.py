"""Word problems: what counts as right, what as no answer, and which rows are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import ArithmeticTask, make_task, task_from_dict


def task(**options: Any) -> ArithmeticTask:
    made = make_task("arithmetic", **options)
    assert isinstance(made, ArithmeticTask)
    return made


def score(made: ArithmeticTask, *pairs: tuple[str, Any]) -> dict[str, float]:
    texts = np.array([text for text, _ in pairs], dtype=object)
    return made.metrics(texts, np.zeros(len(pairs)), Dataset.from_dict({"answer": [gold for _, gold in pairs]}))


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 18", "18"),
        ("18 eggs", "18.0"),
        ("#### 18.00", 18),
        ("The answer is $1,000.", "1000"),
        ("The answer is 1000", "1,000 dollars"),
        ("25%", "25"),
        ("-15", "-15.0"),
        ("3/4", "0.75"),
        ("0.75", "3/4"),
        ("1 1/2", 1.5),
        ("1.83333", "1.8333333333333335"),
        ("11/6", "1.8333333333333335"),
        ("0.3", "0.30000000000000004"),
        ("3", "2.9999999999999996"),
        ("0.6667", "2/3"),
        ("6e4", "60,000"),
        ("9", ["8", "9"]),
    ],
)
def test_right(text: str, gold: Any) -> None:
    assert score(task(), (text, gold))["accuracy"] == 1


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 19", "18"),
        ("#### -18", "18"),
        ("18.0001", "18"),
        ("1234567", "1234568"),
        ("23.66", "23.65"),
        ("1.83", "1.8333333333333335"),
        ("0.25", "25"),
        ("7", ["8", "9"]),
        # The number of the question, not of the answer.
        ("She had 18 eggs and ate 3", "18"),
        ("no number", "0"),
        ("", "0"),
    ],
)
def test_wrong(text: str, gold: Any) -> None:
    assert score(task(), (text, gold))["accuracy"] == 0


def test_a_text_without_an_answer_is_wrong_and_counted_for_itself() -> None:
    scores = score(task(), ("#### 1", "1"), ("#### 2", "1"), ("I do not know", "1"), ("", "1"))
    assert scores == {"accuracy": 0.25, "unparsable": 0.5, "answered_accuracy": 0.5}
    assert score(task(), ("what?", "1")) == {"accuracy": 0.0, "unparsable": 1.0, "answered_accuracy": 0.0}
    made = task(metric="unparsable")
    assert (made.greater_is_better, task().greater_is_better, task().main_metric) == (False, True, "accuracy")


def test_the_tolerance_is_for_numbers_of_more_than_four_decimals() -> None:
    assert score(task(tolerance=0.01), ("1.83", "1.8333333333333335"))["accuracy"] == 1
    assert score(task(tolerance=0), ("1.83333", "1.8333333333333335"))["accuracy"] == 0
    assert score(task(tolerance=0.01), ("1.84", "1.8333"), ("100.5", "100"))["accuracy"] == 0


def test_letters_of_options() -> None:
    made = task(answer="letter")
    scores = score(
        made, ("The answer is (C).", ["C"]), ("(a)", ["A"]), ("B", ["A", "(b)"]), ("A house", ["A"]), ("D", ["E"])
    )
    assert scores == {"accuracy": 0.6, "unparsable": 0.2, "answered_accuracy": 0.75}
    assert made.decode(np.array(["so (d)"], dtype=object)) == [
        {"prediction": "D", "unparsable": False, "generated": "so (d)"}
    ]


def test_what_is_decoded_can_be_written_as_json() -> None:
    texts = np.array(["so 1,234.50 dollars", "2/3", "none"], dtype=object)
    decoded = json.loads(json.dumps(task().decode(texts)))
    assert [row["prediction"] for row in decoded] == ["1234.5", "2/3", None]
    assert [row["unparsable"] for row in decoded] == [False, False, True]
    assert [row["generated"] for row in decoded] == list(texts)


def test_other_markers() -> None:
    made = task(markers=["Antwort:"])
    assert score(made, ("antwort: 5\n6", "5"), ("#### 5\n6", "5"))["accuracy"] == 0.5


ROWS = [{"instruction": "1+1?", "input": "", "output": "It is 2.", "answer": "2"}]


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ([None], "split 'test', row 2: column 'answer' has no value"),
        ([""], "row 2: column 'answer' must hold one number, or a list of such, got ''"),
        (["two"], "row 2: column 'answer' must hold one number.*got 'two'"),
        (["1 #### 2"], "row 2: column 'answer' must hold one number.*got '1 #### 2'"),
    ],
)
def test_a_gold_answer_that_is_none_is_refused_with_its_row(
    gold: list[Any], message: str, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = Dataset.from_dict({"instruction": ["a", "b"], "output": ["x", "y"], "answer": ["1", *gold]})
    with pytest.raises(UserError, match=message):
        task().encode(data, closing_tokenizer, 600, split="test")
    # Nothing is scored there.
    assert len(task().encode(data, closing_tokenizer, 600, split="train")) == 2
    assert len(task().encode(data, closing_tokenizer, 600, split="predict")) == 2


def test_a_gold_list_must_hold_answers(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    for bad in ([], ["1", None], ["1", "one"]):
        data = Dataset.from_dict({"instruction": ["a", "b"], "answer": [["1"], bad]})
        with pytest.raises(UserError, match="row 2: column 'answer' must hold one number, or a list of such"):
            task().encode(data, closing_tokenizer, 600, split="test")


def test_a_gold_letter_must_be_an_option(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"instruction": ["a"], "answer": ["F"]})
    with pytest.raises(UserError, match="row 1: column 'answer' must hold one of the letters A, B, C, D, E"):
        task(answer="letter").encode(data, closing_tokenizer, 600, split="test")


def test_a_truth_value_is_no_number(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"instruction": ["a"], "answer": [True]})
    with pytest.raises(UserError, match="row 1: column 'answer' must hold one number.*got True"):
        task().encode(data, closing_tokenizer, 600, split="test")


def test_the_input_stands_in_the_prompt_only_where_there_is_one(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_list([*ROWS, {**ROWS[0], "input": "Count ä."}])
    short, long = task().encode(data, closing_tokenizer, 1000, split="predict")["input_ids"]
    assert "### Input" not in closing_tokenizer.decode(short)
    assert "### Input:\nCount ä.\n\n### Response:\n" in closing_tokenizer.decode(long)


def test_a_long_problem_is_cut_and_leaves_room_for_the_answer(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_list([{**ROWS[0], "instruction": "eggs " * 500}])
    (ids,) = task().encode(data, closing_tokenizer, 600, split="test")["input_ids"]
    assert len(ids) == 600 - 256
    assert closing_tokenizer.decode(ids).endswith("eggs egg\n\n### Response:\n")


def test_without_a_pad_token_the_end_of_sequence_token_pads(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    assert closing_tokenizer.pad_token is None
    data = Dataset.from_list([*ROWS, {**ROWS[0], "instruction": "and 1+1+1?"}])
    encoded = task().encode(data, closing_tokenizer, 600, split="test")
    batch = task().collator(closing_tokenizer)(list(encoded))
    assert batch["input_ids"][0, 0] == closing_tokenizer.eos_token_id
    assert batch["attention_mask"][0, 0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "letters"}, "'number' or 'letter', got 'letters'; did you mean 'letter'"),
        ({"gold": ""}, "option 'gold' must be the name of a column, got ''"),
        ({"letters": "A1"}, "option 'letters' must be letters such as 'ABCDE', got 'A1'"),
        ({"markers": "####"}, "option 'markers' must be a list of texts"),
        ({"tolerance": 1}, "option 'tolerance' must be a number from 0, less than 1, got 1"),
        ({"tolerance": True}, "option 'tolerance' must be a number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**options)


def test_a_task_is_the_same_after_it_was_saved() -> None:
    made = task(answer="letter", gold="right", generation={"num_beams": 4})
    assert task_from_dict(json.loads(json.dumps(made.to_dict()))) == made
