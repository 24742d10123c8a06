"""The right answers to a question as data sets of the form of SQuAD hold them, and the tokens that they cover."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from turnrow.errors import UserError

__all__ = ["Answer", "gold_answers", "token_span"]


class Answer(NamedTuple):
    """A text, and the character of the context at which it begins."""

    text: str
    start: int


def gold_answers(value: object, context: str, column: str, place: str) -> list[Answer]:
    """Read a row's answers, of which blank ones are left out: so some data sets say that there is none.

    Args:
        value: ``{"text": [...], "answer_start": [...]}`` or a list of ``{"text": ..., "answer_start": ...}``.
        context: what they are cut out of.
        column: where `value` stands, for errors.
        place: of the row, for errors.

    Raises:
        UserError: the value has another form, or an answer does not stand where it should.
    """
    answers = [answer for answer in _pairs(value, column, place) if answer.text.strip()]
    for text, start in answers:
        stands = context[start : start + len(text)] if start >= 0 else ""
        if stands != text:
            elsewhere = context.find(text)
            hint = f"it first stands at {elsewhere}" if elsewhere >= 0 else "it stands nowhere in the context"
            raise UserError(
                f"{place}: the answer {text!r} should begin at character {start} of the context, where {stands!r} stands; {hint}"
            )
    return answers


def token_span(answer: Answer, starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last token that share a character with the answer; None if none does.

    Args:
        answer: the answer.
        starts: the character at which each token of the context begins.
        ends: the one after each token's last.
    """
    first = bisect_right(ends, answer.start)
    last = bisect_left(starts, answer.start + len(answer.text)) - 1
    return (first, last) if first <= last else None


def _pairs(value: object, column: str, place: str) -> list[Answer]:
    texts: object = None
    starts: object = None
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
        texts, starts = ([answer.get(name) for answer in value] for name in ("text", "answer_start"))
    if (
        not isinstance(texts, list)
        or not isinstance(starts, list)
        or len(texts) != len(starts)
        or not all(isinstance(text, str) for text in texts)
        or not all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
    ):
        raise UserError(
            f"{place}: column {column!r} must hold {{'text': [...], 'answer_start': [...]}} with as many places as texts, "
            f"got {value!r}"
        )
    return [Answer(text, start) for text, start in zip(texts, starts, strict=True)]
