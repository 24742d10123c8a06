"""Conversations about an image, in the form of LLaVA, as the tokens that a processor makes of them.

The form (Liu et al. 2023, arXiv:2304.08485): a list of ``{"from": "human" | "gpt" | "system", "value": TEXT}``, where ``<image>`` in the
text says where the image belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError
from turnrow.tasks.conversations import answer_places, up_to_last_answer, write_turns
from turnrow.tasks.padding import IGNORED
from turnrow.tasks.tokens import tokenizer_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["VisualPrompter", "last_answer", "read_conversation"]

Turns = list[dict[str, Any]]
"""Messages with `role` and `content`, which is a list of parts, texts and images."""

_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_conversation(value: object, has_image: bool, column: str, place: str) -> Turns:
    """Return the turns in a cell, with `<image>` made a part of its own.

    Raises:
        UserError: the cell has another form, or as many marks as there are images it has not.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(
            f"{place}: column {column!r} must hold a list of turns such as {{'from': 'human', 'value': 'What is it?'}}, got {value!r}"
        )
    turns: Turns = []
    for number, turn in enumerate(value, start=1):
        speaker, said = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(said, str):
            raise UserError(
                f"{place}, turn {number}: a turn has 'from' ({', '.join(_ROLES)}) and a text 'value', got {turn!r}"
            )
        turns.append({"role": _ROLES[speaker], "content": _parts(said)})
    marks = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if marks != has_image:
        raise UserError(
            f"{place}: {'one <image>' if has_image else 'no <image>'} must stand in the conversation, since the row has "
            f"{'an image' if has_image else 'none'}, and there are {marks}"
        )
    return turns


def last_answer(turns: Turns) -> str | None:
    """What the assistant says at the end; None if the end is a question."""
    if not turns or turns[-1]["role"] != "assistant":
        return None
    return _said(turns[-1]).strip()


@dataclass(frozen=True)
class VisualPrompter:
    """Writes conversations in the form of a processor's chat template.

    The text is tokenized as a whole, and the one token of the image then replaced by those that the processor has for it, so that
    the tokens are the processor's own and the place of each in the text is known.
    """

    processor: Any
    """Of transformers, with a tokenizer and an image processor."""

    def __post_init__(self) -> None:
        if not getattr(self.processor, "chat_template", None):
            raise UserError(
                "the processor of the model has no chat template, so conversations cannot be written as it knows them; set "
                "processor.chat_template and save it again"
            )

    def asked(self, turns: Turns, image: Image | None, limit: int, place: str) -> list[int]:
        """Return the tokens of a conversation up to the answer that is asked for; a last answer is left out.

        Raises:
            UserError: there is no question, or there are more than `limit` tokens.
        """
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not any(turn["role"] == "user" for turn in turns):
            raise UserError(f"{place}: the conversation holds no question to be answered")
        text = self._written(turns, place, asks=True)
        ids, _ = self._tokens(text, self._answers(turns, text, place), image, place)
        if len(ids) > limit:
            raise UserError(
                f"{place}: the conversation takes {len(ids)} tokens with its image, and there is room for {limit}; raise max_length, "
                "lower generation.max_new_tokens, or shorten the row"
            )
        return ids

    def answered(self, turns: Turns, image: Image | None, limit: int, place: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a conversation, and labels that are `IGNORED` but for what the assistant says.

        An answer that the template closes with no special token is closed with the end-of-sequence token. What the assistant opens a
        conversation with answers nothing and is not learned. What follows the last answer is left out, and so is, at the
        end, what is more than `limit` tokens.

        Raises:
            UserError: the assistant answers nothing, or a blank; or within `limit` tokens there is no room for the image or for an answer.
        """
        turns = up_to_last_answer(turns, _said, place)
        text = self._written(turns, place, asks=False).rstrip()
        ids, learned = self._tokens(text, self._answers(turns, text, place), image, place)
        labels = [token if wanted else IGNORED for token, wanted in zip(ids, learned, strict=True)]
        if all(label == IGNORED for label in labels[:limit]) or self._image_token in ids[limit:]:
            raise UserError(
                f"{place}: the conversation takes {len(ids)} tokens with its image, of which max_length keeps {limit}; they hold no "
                "answer, or not the whole image. Raise max_length, or remove the row"
            )
        return ids[:limit], labels[:limit]

    @property
    def _image_token(self) -> int:
        tokenizer: Any = tokenizer_of(self.processor)
        return int(tokenizer.convert_tokens_to_ids(self._image_text))

    @property
    def _image_text(self) -> str:
        return str(getattr(self.processor, "image_token", _MARK))

    def _answers(self, turns: Turns, text: str, place: str) -> list[tuple[int, int]]:
        """Where in `text` the answers begin and end."""
        found = []
        for number in answer_places(turns):
            asked = self._written(turns[:number], place, asks=True)
            whole = self._written(turns[: number + 1], place, asks=False).rstrip()
            if not whole.startswith(asked) or not text.startswith(whole):
                raise UserError(
                    "the chat template of the processor writes a turn otherwise once others follow it, so the answers cannot be told "
                    "from what is between them; take another template"
                )
            found.append((len(asked), len(whole)))
        return found

    def _tokens(
        self, text: str, answers: Sequence[tuple[int, int]], image: Image | None, place: str
    ) -> tuple[list[int], list[bool]]:
        """The tokens of `text` with those of the image, and which of them belong to an answer."""
        tokenizer: Any = tokenizer_of(self.processor)
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        encoded = tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True, verbose=False)
        ids, places = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        # A token that ends a text would end it before it is answered.
        while ids and places[-1][0] == places[-1][1]:
            ids.pop(), places.pop()
        if ids.count(self._image_token) != (image is not None):
            raise UserError(
                f"{place}: the chat template of the processor writes {self._image_text!r} {ids.count(self._image_token)} times for "
                f"{'one image' if image is not None else 'no image'}; take a template that says where images belong"
            )
        tokens: list[int] = []
        learned: list[bool] = []
        added = tokenizer.added_tokens_decoder.items()
        special = {*tokenizer.all_special_ids, *(token for token, how in added if how.special)}
        owners = [_owner(span, answers) for span in places]
        for token, owner, after in zip(ids, owners, [*owners[1:], None], strict=True):
            held = self._of_image(image) if token == self._image_token else [token]
            if owner is not None and after != owner and token not in special and tokenizer.eos_token_id is not None:
                held = [*held, tokenizer.eos_token_id]
            tokens += held
            learned += [owner is not None] * len(held)
        return tokens, learned

    def _of_image(self, image: Image | None) -> list[int]:
        """The tokens that stand for the image in the model's input."""
        made = self.processor(text=[self._image_text], images=[image], add_special_tokens=False, verbose=False)
        return list(made["input_ids"][0])

    def _written(self, turns: Turns, place: str, *, asks: bool) -> str:
        return write_turns(self.processor, "the processor", turns, place, asks=asks)


def _said(turn: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _parts(said: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, text in enumerate(said.split(_MARK)):
        if number:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip("\n") if _MARK in said else text})
    return parts


def _owner(span: tuple[int, int], answers: Sequence[tuple[int, int]]) -> int | None:
    """The number of the answer that a token stands in, whole; None of none."""
    start, end = span
    return next((n for n, (first, last) in enumerate(answers) if first <= start < end <= last), None)
