"""Conversations of several turns, in the form in which a tokenizer writes them, within a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError
from turnrow.tasks.padding import IGNORED
from turnrow.tasks.templates import greatest_fitting, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Turns",
    "answer_places",
    "answered_conversation",
    "asked_conversation",
    "read_turns",
    "up_to_last_answer",
    "write_turns",
]

Turns = list[dict[str, str]]
"""Messages with `role` and `content`."""


def read_turns(value: Any, column: str, place: str) -> Turns:
    """Return the messages in a cell.

    Raises:
        UserError: they are no list of objects with a role and a text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{place}: column {column!r} must hold a list of messages, got {value!r}")
    turns = []
    for number, message in enumerate(value, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{place}, message {number}: a message is an object with the texts 'role' and 'content', got {message!r}"
            )
        turns.append({"role": role, "content": content})
    return turns


def answer_places(turns: Sequence[dict[str, Any]]) -> list[int]:
    """Return where the assistant answers: all that it says, but for what it opens the conversation with, which is context."""
    first = next((number for number, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
    return [number for number, turn in enumerate(turns) if number > first and turn["role"] == "assistant"]


def up_to_last_answer(
    turns: list[dict[str, Any]], said: Callable[[dict[str, Any]], str], place: str
) -> list[dict[str, Any]]:
    """Return a conversation that is to be learned, without what follows its last answer.

    Args:
        turns: messages with `role` and `content`.
        said: the text of a message.
        place: of the row, for errors.

    Raises:
        UserError: the assistant answers nothing, or a blank.
    """
    answers = answer_places(turns)
    if not answers:
        raise UserError(f"{place}: nothing is answered in this conversation, so there is nothing to learn; remove it")
    if any(not said(turns[number]).strip() for number in answers):
        raise UserError(
            f"{place}: an answer of the assistant is blank, so there is nothing to learn from it; remove the row"
        )
    return turns[: answers[-1] + 1]


def asked_conversation(tokenizer: PreTrainedTokenizerBase, turns: Turns, limit: int, place: str) -> list[int]:
    """Return the tokens of a conversation up to the answer that is asked for; a last answer that it holds is left out.

    Args:
        tokenizer: with a chat template.
        turns: as `read_turns` returns them.
        limit: the most tokens. Where there are more, the oldest exchanges are left out, and then the longest message of the last
            one is cut at its end. A system message at the beginning stays.
        place: of the row, for errors.

    Raises:
        UserError: there is no question, the template refuses the turns, or they do not fit even so.
    """
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not any(turn["role"] != "system" for turn in turns):
        raise UserError(f"{place}: the conversation holds no message to be answered")
    return _shortened(tokenizer, turns, limit, place)


def answered_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, limit: int, place: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation, and labels that are `IGNORED` but for what the assistant says.

    The tokens of an answer are made apart from those before it, so that a model is trained on exactly what it later goes on
    with. What it opens a conversation with answers nothing and is not learned; what follows the last answer is left out. The rest is as
    in `asked_conversation`; the last answer is cut at its end where it would leave what stands before it less than half of `limit`, and
    it alone is learned where several to one question are too long together.

    Raises:
        UserError: the assistant answers nothing, or a blank; or as in `asked_conversation`.
    """
    turns = up_to_last_answer(turns, lambda turn: str(turn["content"]), place)
    while True:
        pieces = _pieces(tokenizer, turns, place)
        if sum(len(ids) for ids, _ in pieces) <= limit:
            break
        shorter = _without_oldest(turns)
        if shorter is None:
            *before, (answer, _) = pieces
            answer = answer[: limit - min(sum(len(ids) for ids, _ in before), limit // 2)]
            pieces = [(_shortened(tokenizer, turns[:-1], limit - len(answer), place), False), (answer, True)]
            break
        turns = shorter
    ids = [token for piece, _ in pieces for token in piece]
    labels = [token if learned else IGNORED for piece, learned in pieces for token in piece]
    return ids, labels


def _pieces(tokenizer: PreTrainedTokenizerBase, turns: Turns, place: str) -> list[tuple[list[int], bool]]:
    """The tokens between answers, and those of answers, in turn; with whether they are an answer."""
    pieces = []
    written = ""
    for number in answer_places(turns):
        asked = _written(tokenizer, turns[:number], place, asks=True)
        whole = _written(tokenizer, turns[: number + 1], place, asks=False)
        if not asked.startswith(written) or not whole.startswith(asked):
            raise UserError(
                f"the chat template of the tokenizer {tokenizer.name_or_path!r} writes a turn otherwise once others follow it, "
                "so the answers cannot be told from what is between them; take another template"
            )
        pieces += [(asked.removeprefix(written), False), (whole.removeprefix(asked), True)]
        written = whole
    return [(_ids(tokenizer, text), learned) for text, learned in pieces]


def _shortened(tokenizer: PreTrainedTokenizerBase, turns: Turns, limit: int, place: str) -> list[int]:
    def tokens(asked: Turns) -> list[int]:
        return _ids(tokenizer, _written(tokenizer, asked, place, asks=True))

    while len(ids := tokens(turns)) > limit:
        shorter = _without_oldest(turns)
        if shorter is None:
            break
        turns = shorter
    if len(ids) <= limit:
        return ids

    def cut(longest: int) -> Turns:
        return [{**turn, "content": shortened(turn["content"], longest)} for turn in turns]

    longest = greatest_fitting(max(len(turn["content"]) for turn in turns), lambda n: len(tokens(cut(n))) <= limit)
    if longest is None:
        raise UserError(
            f"{place}: the conversation takes more than {limit} tokens even without its messages; raise max_length"
        )
    return tokens(cut(longest))


def _without_oldest(turns: Turns) -> Turns | None:
    """Without the oldest exchange behind the system message; None if there is but one. Answers stay with their question."""
    start = 0
    while start < len(turns) and turns[start]["role"] == "system":
        start += 1
    for number in range(start, len(turns) - 1):
        if turns[number]["role"] == "assistant" != turns[number + 1]["role"]:
            return turns[:start] + turns[number + 1 :]
    return None


def write_turns(writer: Any, what: str, turns: Sequence[dict[str, Any]], place: str, *, asks: bool) -> str:
    """Return turns as the chat template of a tokenizer or a processor writes them.

    Args:
        writer: with `apply_chat_template`.
        what: how to call it in errors.
        turns: messages with `role` and `content`.
        place: of the row, for errors.
        asks: whether the beginning of an answer follows.

    Raises:
        UserError: the template refuses the turns.
    """
    from jinja2 import TemplateError

    try:
        return str(writer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"{place}: the chat template of {what} refuses the turns {roles}: {error}") from error


def _written(tokenizer: PreTrainedTokenizerBase, turns: Turns, place: str, *, asks: bool) -> str:
    return write_turns(tokenizer, f"the tokenizer {tokenizer.name_or_path!r}", turns, place, asks=asks)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
