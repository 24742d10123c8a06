"""Prompts from columns: what is filled in, what is refused, and what is cut where it is too long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks.templates import Template, choose, parse_templates

ALPACA = ["{instruction} with {input}:", "{instruction}:"]


def test_columns_are_filled_in_and_braces_are_written_double() -> None:
    template = Template("Q: {question} {{x}}\nA:", "prompt")
    assert template.columns == ("question",)
    assert template.fill({"question": "why {so}?"}) == "Q: why {so}? {x}\nA:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q: {question", "option 'prompt' is no template: .*write {{ for a brace"),
        ("Q: }", "option 'prompt' is no template"),
        ("Q: {question.__class__}", "names {question.__class__}; in braces stands the name of a column"),
        ("Q: {0}", "names {0}"),
        ("Q: {}", "names {}"),
        ("Q: {n:d}", "in braces stands the name of a column and nothing else"),
        ("Q: {n!r}", "in braces stands the name of a column and nothing else"),
        ("Q: what?", "option 'prompt' reads no column: 'Q: what\\?'"),
    ],
)
def test_what_is_no_template_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Template(text, "prompt")


@pytest.mark.parametrize("text", [5, ["{a}"], None])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(UserError, match="option 'target' must be a text with names in braces, got "):
        Template(text, "target")


@pytest.mark.parametrize("texts", [[], None, 3, ["{a}", 3]])
def test_one_text_or_several_are_wanted(texts: object) -> None:
    with pytest.raises(UserError, match="option 'prompt' must be a template such as '{question}', or a list of them"):
        parse_templates(texts, "prompt")  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "chosen"), [("a", 0), ("", 1), ("  ", 1)])
def test_a_row_takes_the_first_template_that_it_has_texts_for(value: str, chosen: int) -> None:
    templates = parse_templates(ALPACA, "prompt")
    assert choose(templates, {"instruction": "do", "input": value}) is templates[chosen]


def test_a_row_without_any_text_takes_the_last() -> None:
    templates = parse_templates(ALPACA, "prompt")
    assert choose(templates, {"instruction": "", "input": ""}) is templates[1]


def test_the_longest_value_is_cut_and_the_template_stays() -> None:
    template = Template("Read: {document}\nIn short ({style}):", "prompt")
    row = {"document": "one two three four", "style": "plain"}
    assert template.fit(row, lambda text: len(text) <= 31) == "Read: one two\nIn short (plain):"
    assert template.fit(row, lambda text: len(text) <= 100) == template.fill(row)
    assert template.fit(row, lambda text: len(text) <= 10) is None


@given(st.text(max_size=60), st.text(max_size=60), st.integers(0, 100))
def test_cut_values_are_as_long_as_they_may_be(a: str, b: str, limit: int) -> None:
    template = Template("<{a}|{b}>", "prompt")
    row = {"a": a, "b": b}
    text = template.fit(row, lambda filled: len(filled) <= limit)
    every = [template.fill(row, longest) for longest in range(61)]
    assert text == max((filled for filled in every if len(filled) <= limit), key=len, default=None)


def test_where_two_values_are_long_both_are_cut() -> None:
    template = Template("{a} / {b} / {c}", "prompt")
    row = {"a": "a" * 50, "b": "b" * 40, "c": "ccc"}
    assert template.fit(row, lambda text: len(text) <= 29) == "a" * 10 + " / " + "b" * 10 + " / ccc"
