"""An answer as it goes out: its text, and the tokens whose text has gone out, with their log-probabilities in OpenAI's forms."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turnrow.serving.http.tokens import TokenText, TokenTexts
from turnrow.serving.requests import Event, TokenLogprob

__all__ = ["AnswerPieces", "ShownToken", "chat_logprobs", "completion_logprobs"]


@dataclass(frozen=True)
class ShownToken:
    """A token of an answer."""

    token: TokenText
    offset: int
    """Characters of the answer before it."""
    logprob: TokenLogprob


class AnswerPieces:
    """Holds tokens back until their text goes out, so that none is shown of a stop string or of the end of the sequence.

    Args:
        texts: of the tokenizer.
        ends: tokens that end an answer.
        start: characters before the answer, such as those of a prompt that is repeated.
    """

    def __init__(self, texts: TokenTexts, ends: frozenset[int], start: int = 0) -> None:
        self._texts, self._ends = texts, ends
        self._held: deque[ShownToken] = deque()
        self._shown = start
        """Characters that have gone out."""
        self._read = start
        """Characters that the tokens so far stand for."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, event: Event) -> list[ShownToken]:
        """The tokens that go out with the text of the next event."""
        self._shown += len(event.text)
        for logprob in event.logprobs or ():
            token = self._texts[logprob.token_id]
            if token.data and not _continues(token.data):  # what came before it stays no character
                self._read += len(self._decoder.decode(b"", final=True))
            self._held.append(ShownToken(token, self._read, logprob))
            if not token.is_special:
                self._read += len(self._decoder.decode(token.data))
        if event.finish_reason is None:
            return self._until_shown()
        if event.finish_reason == "stop" and event.token_ids[-1] not in self._ends:
            return self._until_shown()  # the rest is of a stop string
        if event.finish_reason == "stop" and self._held:
            self._held.pop()
        return [self._held.popleft() for _ in range(len(self._held))]

    def _until_shown(self) -> list[ShownToken]:
        out = []
        while self._held and self._held[0].offset < self._shown:
            out.append(self._held.popleft())
        return out


def chat_logprobs(shown: Sequence[ShownToken], texts: TokenTexts) -> dict[str, Any]:
    """In the form of chats."""
    return {
        "content": [
            _entry(one.token, one.logprob.logprob)
            | {"top_logprobs": [_entry(texts[token], logprob) for token, logprob in one.logprob.top]}
            for one in shown
        ],
        "refusal": None,
    }


def completion_logprobs(shown: Sequence[ShownToken], texts: TokenTexts) -> dict[str, Any]:
    """In the form of completions. The token that was chosen is always among the most likely ones, so that there may be one more."""
    return {
        "tokens": [one.token.text for one in shown],
        "token_logprobs": [_finite(one.logprob.logprob) for one in shown],
        "top_logprobs": [_top(one, texts) for one in shown],
        "text_offset": [one.offset for one in shown],
    }


def _continues(data: bytes) -> bool:
    """Whether it begins within a character."""
    return data[0] & 0xC0 == 0x80


def _entry(token: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(logprob), "bytes": list(token.data)}


def _top(one: ShownToken, texts: TokenTexts) -> dict[str, float]:
    top: dict[str, float] = {}
    for token, logprob in one.logprob.top:
        top.setdefault(texts[token].text, _finite(logprob))  # of two tokens of the same text, the more likely
    top.setdefault(one.token.text, _finite(one.logprob.logprob))
    return top


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's API has -9999 in its place."""
    return max(logprob, -9999.0)
