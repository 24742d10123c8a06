"""The text of an answer as its tokens come in: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["AnswerText"]

_CONTEXT = 6
"""Tokens before, with which the first token is decoded: whether it begins with a space depends on them."""

_INCOMPLETE = "\ufffd"
"""What the beginning of a character decodes to."""


class AnswerText:
    """Turns tokens into text, piece by piece.

    Tokens are decoded together with some that were before, of which the text is known; what is more is new. A token may hold
    only a part of a character (tokens are bytes), then its text waits for the others; a last one that stays incomplete is dropped.
    Text that might be the beginning of a stop string waits too.

    Args:
        tokenizer: of transformers.
        prompt_ids: tokens of the prompt; the last few give the context.
        stop: stop strings.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._read = len(self._ids)
        """Tokens up to here are in `_known`."""
        self._known = self._decode(self._ids)
        self._stop = tuple(stop)
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """A stop string was met; there is no more text."""

    def add(self, token_id: int) -> str:
        """Take one more token; return the text that is certain now."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_INCOMPLETE) and not self._is_garbage(text):
            return ""
        new = text[len(self._known) :]
        # what was decoded serves as the context of what comes
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        return self._without_stops(new)

    def finish(self) -> str:
        """The text that still waited, after the last token; nothing of an incomplete character."""
        held, self._held = self._held, ""
        if self.stopped:
            return ""
        rest = self._decode(self._ids)[len(self._known) :].rstrip(_INCOMPLETE)
        return self._cut(held + rest)

    def _is_garbage(self, text: str) -> bool:
        """Whether the bytes at the end are no beginning of a character: none needs more than four bytes."""
        return len(self._ids) - self._read >= 2 * 4 or text.endswith(_INCOMPLETE * 4)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _without_stops(self, new: str) -> str:
        text = self._cut(self._held + new)
        self._held = ""
        if self.stopped or not self._stop:
            return text
        kept = max(_overlap(text, stop) for stop in self._stop)
        if kept:
            text, self._held = text[:-kept], text[-kept:]
        return text

    def _cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(places)
        return text[: min(places)] if places else text


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of `text` is that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
