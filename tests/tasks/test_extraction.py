"""What counts as the answer in a text: the rules of the module, one by one, and against references of real data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks import read_table
from turnrow.tasks.extraction import (
    after_marker,
    check_markers,
    extract_label,
    extract_letter,
    extract_number,
    numbers,
    written,
)

MARKERS = ["####", "the answer is"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # grouped digits and lists
        ("1,000", "1000"),
        ("12,34,567", "1234567"),
        ("$1,234,567.50", "1234567.5"),
        ("3,4", "3 4"),
        ("1,2345", "1 2345"),
        # decimals
        ("0.5", "0.5"),
        ("is .5", "0.5"),
        ("It is 18.", "18"),
        ("18.00.", "18"),
        ("1.2.3", "1.2"),
        # fractions
        ("3/4", "0.75"),
        ("2/3 of it", "2/3"),
        ("18 / 3", "6"),
        ("1 1/2", "1.5"),
        ("1-1/2 miles", "1.5"),
        ("5 10/2", "5 5"),
        ("-1 1/2", "-1.5"),
        ("1,000/4", "250"),
        ("1,000/3 or 1/1,000", "1000/3 0.001"),
        ("1,000 1/2", "1000.5"),
        ("3,4/5", "3 0.8"),
        ("½", "0.5"),
        ("½½", "0.5 0.5"),
        ("about½", "0.5"),
        ("1½ cups", "1.5"),
        ("5/0", ""),
        # powers of ten
        ("6e4", "60000"),
        ("1.5E-3", "0.0015"),
        ("6 x 10^4", "60000"),
        ("6×10^{-2}", "0.06"),
        # signs
        ("-5", "-5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("x=-5", "-5"),
        ("(-5)", "-5"),
        ("-½", "-0.5"),
        ("−½", "-0.5"),
        ("-1½", "-1.5"),
        ("-$½", "-0.5"),
        ("-1,000/4", "-250"),
        ("x -5", "-5"),
        ("7-5", "7 5"),
        ("7 - 5", "7 5"),
        ("7 -5", "7 5"),
        ("f(7)-5", "7 5"),
        ("10-20", "10 20"),
        ("COVID-19", "19"),
        # currencies, percents, units
        ("$ 2.00", "2"),
        ("€5, 6 £", "5 6"),
        ("Rs.500", "500"),
        ("25%", "25"),
        ("5kg", "5"),
        ("60 m", "60"),
        # no numbers
        ("CO2", ""),
        ("5 m^2", "5"),
        ("none", ""),
        ("", ""),
        ("٣", ""),
        # GSM8K's notes
        ("$<<80000+50000=130000>>130,000", "80000 50000 130000 130000"),
    ],
)
def test_numbers_in_a_text(text: str, expected: str) -> None:
    assert " ".join(map(written, numbers(text))) == expected


@pytest.mark.parametrize("text", ["9" * 5000, "1e999999999", "1e301", "1e-301", "1" + ",000" * 200, "1e-999999999"])
def test_a_number_without_end_is_none_and_costs_nothing(text: str) -> None:
    assert numbers(text) == []
    assert numbers(f"7 {text} 8") == [7, 8]


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4))
def test_a_number_is_read_as_it_is_written(value: Fraction) -> None:
    assert extract_number(written(value)) == value
    assert extract_number(f"a 1, or 2?\nThe answer is {written(value)} m.", MARKERS) == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**8), max_value=10**8))
def test_decimals_are_written_as_python_writes_them(value: object) -> None:
    number = Fraction(str(value))
    assert Fraction(written(number)) == number
    assert "/" not in written(number)


@given(st.text())
def test_any_text_has_an_answer_or_none(text: str) -> None:
    assert extract_number(text, MARKERS) is None or numbers(text)
    assert extract_letter(text) in {*"ABCDE", None}
    assert extract_label(text, ["true", "false"]) in {"true", "false", None}


def test_the_number_stands_on_the_first_line_behind_the_last_marker() -> None:
    assert extract_number("3 and 4", MARKERS) == 4
    assert extract_number("#### 3\n4", MARKERS) == 3
    assert extract_number("####\n\n 3 \n4", MARKERS) == 3
    assert extract_number("#### 3 and ####\n4", MARKERS) == 4
    assert extract_number("The Answer Is 3 + 4 = 7.\nNext: 9", MARKERS) == 7
    assert extract_number("7 is it. The answer is", MARKERS) is None
    assert extract_number("3 and 4") == 4


def test_a_text_that_repeats_the_numbers_of_the_question_gives_the_one_behind_the_marker() -> None:
    text = "There were 7 crayons. Mary took 3, so there are 7 - 3 = 4 crayons. The answer is 4. 7 crayons were there."
    assert numbers(text)[-1] == 7
    # The sentence of the answer shares its line with more.
    assert extract_number(text, MARKERS) == 7
    assert extract_number(text.replace(" 7 crayons were", "\n7 crayons were"), MARKERS) == 4


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("The answer is (C).", "C"),
        ("the answer is c", None),
        ("the answer is (c)", "C"),
        ("C) 30", "C"),
        ("A car drives. So B", "B"),
        ("A car drives.", None),
        ("A is right", "A"),
        ("The answer is A because B is less.", "A"),
        ("The answer is (D) because (A) is wrong", "D"),
        ("not B but E", "E"),
        ("The answer is (A). No, the answer is (B).", "B"),
        ("D'Arcy, A's, ABC", None),
        ("F", None),
        ("", None),
    ],
)
def test_the_letter_of_an_option(text: str, letter: str | None) -> None:
    assert extract_letter(text, markers=MARKERS) == letter


def test_other_letters_can_be_options() -> None:
    assert extract_letter("the answer is (f)", "EFG") == "F"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("the correct answer is answer1", "answer1"),
        ("Answer10!", "answer10"),
        ("answer1 or answer10", None),
        ("answer1, yes, answer1", "answer1"),
        ("answer1 is wrong; the correct answer is answer10", "answer10"),
        ("the correct answer is answer1, not answer10", None),
        ("myanswer1", None),
        ("answer100", None),
        ("", None),
    ],
)
def test_the_label_in_a_text(text: str, label: str | None) -> None:
    assert extract_label(text, ["answer1", "answer10"], ["answer is"]) == label


def test_the_longest_label_counts_where_one_begins_another() -> None:
    assert extract_label("in New York", ["New", "New York"]) == "New York"
    assert extract_label("Straße", ["STRASSE", "Weg"]) == "STRASSE"


def test_markers_are_text_not_patterns() -> None:
    assert after_marker("a.b a(b) c", ["a(b)"]) == (" c", True)
    assert after_marker("axb", ["a.b"]) == ("axb", False)
    for wrong in ("####", [""], [3], None):
        with pytest.raises(UserError, match="option 'markers' must be a list of texts"):
            check_markers(wrong)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_gsm8k_references_give_the_gold_answer(split: str, real_data: Callable[[str, str], Path]) -> None:
    rows = read_table(real_data("gsm8k", split))
    failed = [row for row in rows if extract_number(row["output"], MARKERS) != Fraction(row["answer"])]
    for row in failed:
        print(json.dumps(row))
    assert len(failed) <= len(rows) // 1000


@pytest.mark.parametrize("name", ["gsm8k", "addsub", "singleeq"])
def test_the_number_is_that_of_the_published_rule(name: str, real_data: Callable[[str, str], Path]) -> None:
    # LLM-Adapters' rule: the last number of the text, commas dropped. Where the rules part, the texts are known.
    texts = read_table(real_data(name, "test"))["output"]
    published = [float(re.findall(r"-?\d+\.?\d*", text.replace(",", ""))[-1]) for text in texts]
    ours = [extract_number(text, MARKERS) for text in texts]
    differ = [
        (text, theirs, our)
        for text, theirs, our in zip(texts, published, ours, strict=True)
        if our is None or float(our) != theirs
    ]
    for difference in differ:
        print(*difference)
    assert len(differ) == {"gsm8k": 0, "addsub": 0, "singleeq": 0}[name]


def test_mawps_answers_are_numbers_and_what_is_written_of_them_is_read_back(
    real_data: Callable[[str, str], Path],
) -> None:
    # MAWPS has no solutions; its answers stand in a sentence as a trained model writes them.
    answers = read_table(real_data("mawps", "train"))["answer"]
    assert all(numbers(answer) == [Fraction(answer)] for answer in answers)
    assert all(extract_number(f"x = 3\nThe answer is {answer}.", MARKERS) == Fraction(answer) for answer in answers)


def test_aqua_rationales_name_an_option(real_data: Callable[[str, str], Path]) -> None:
    # Written by a model and often wrong, so it is the letter that they claim that is compared, not the gold one.
    texts = read_table(real_data("aqua", "test"))["output"]
    claimed = [re.findall(r"answer is \(?([A-E])\b", text) for text in texts]
    found = [extract_letter(text, markers=MARKERS) for text in texts]
    differ = [(text, our) for text, theirs, our in zip(texts, claimed, found, strict=True) if theirs[-1:] != [our]]
    for text, our in differ:
        print(our, text)
    # Two rationales break off before they name an option.
    assert len(differ) == 2
