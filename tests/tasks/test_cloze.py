from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks.cloze import Cloze


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("{a} It was {mask}.", "Fine film. It was", "."),
        ("{mask}: {a}", "", ": Fine film."),
        ("{a:open}? {mask}, {b:lower}", "Fine film?", ", a Man drinks"),
        ("{a}{mask}", "Fine film.", ""),
        ("({mask}) {b} {a}", "(", ") A Man drinks Fine film."),
        ("{{{a}}} {mask} {{}}", "{Fine film.}", " {}"),
    ],
)
def test_a_template_is_filled_around_its_mask(template: str, before: str, after: str) -> None:
    assert Cloze(template).fill({"a": "Fine film.", "b": "A Man drinks"}) == (before, after)


@pytest.mark.parametrize(
    ("text", "opened"),
    [("It ran.", "It ran"), ("Who?! ", "Who?"), ("no mark", "no mark"), ("", ""), (".", ""), ("猫が座った。", "猫が座った"), ("a “b”", "a “b")],
)  # fmt: skip
def test_an_open_text_has_lost_its_last_mark_alone(text: str, opened: str) -> None:
    assert Cloze("{a:open}{mask}").fill({"a": text})[0] == opened


def test_columns_lead_and_end_are_told() -> None:
    cloze = Cloze("{b} and {a}; {b}: {mask} ")
    assert (cloze.columns, cloze.lead, cloze.ends_with_mask) == (("b", "a"), ": ", True)
    assert not Cloze("{a} {mask}.").ends_with_mask
    assert not Cloze("{mask} {a}").ends_with_mask


@given(st.text("ab .", max_size=30), st.text("ab .", max_size=30), st.integers(0, 70))
def test_what_does_not_fit_is_cut_from_the_longest_texts_and_never_from_the_template(
    a: str, b: str, limit: int
) -> None:
    cloze = Cloze("<{a}|{mask}|{b}>")
    found = cloze.fit({"a": a, "b": b}, lambda before, after: len(before + after) <= limit)
    if found is None:
        assert limit < len("<||>")
        return
    before, after = found
    assert before[0] + before[-1] + after[0] + after[-1] == "<||>"
    kept_a, kept_b = before[1:-1], after[1:-1]
    assert (a.startswith(kept_a), b.startswith(kept_b)) == (True, True)
    assert len(before + after) <= limit
    if (kept_a, kept_b) != (a, b):
        longest = max(len(kept_a), len(kept_b))
        # A text that was cut is, but for blanks at its new end, as long as the longest that is left.
        for text, kept in ((a, kept_a), (b, kept_b)):
            assert kept == text or text[:longest].rstrip() == kept or len(kept) == longest
        one_more = cloze.fill({"a": a, "b": b}, longest + 1)
        assert len("".join(one_more)) > limit or one_more == found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a} It was.", r"must have \{mask\} once, where the label word stands, and has it 0 times"),
        ("{mask} {a} {mask}", "has it 2 times"),
        ("It was {mask}.", "reads no column"),
        ("{a {mask}", "is no template"),
        ("{a!r} {mask}", r"names \{a\}; in braces stands the name of a column"),
        ("{0} {mask}", r"names \{0\}"),
        ("{a:opne} {mask}", "asks for the form 'opne' of column 'a'; forms are open, lower; did you mean 'open'"),
        ("{a} {mask:lower}", r"names \{mask\}"),
        (None, "must be a text such as"),
    ],
)
def test_wrong_templates_are_refused(template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cloze(template)
