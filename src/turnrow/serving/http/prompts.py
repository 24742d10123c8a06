"""The tokens of what clients ask: texts, tokens, and chats by the model's own template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jinja2
from starlette.concurrency import run_in_threadpool

from turnrow.serving.http.bodies import Message
from turnrow.serving.http.errors import ApiError

__all__ = ["Prompt", "Prompts"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Prompt:
    """A prompt."""

    ids: Sequence[int]
    text: str | None
    """None where tokens were given."""


class Prompts:
    """Makes prompts, in a thread beside the server's own and one at a time: a long text takes a while, in which others go on.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._one = asyncio.Lock()

    async def of_completion(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
        """The prompts of a completion: a text, a list of tokens, or a list of either.

        Raises:
            ApiError: there is none.
        """
        if isinstance(prompt, str):
            return [await self._aside(self._of_text, prompt)]
        if not prompt:
            raise ApiError(400, "prompt is an empty list", param="prompt")
        several: list[Any] = [prompt] if isinstance(prompt[0], int) else list(prompt)
        return [
            Prompt(one, None) if isinstance(one, list) else await self._aside(self._of_text, one) for one in several
        ]

    async def of_chat(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of a chat, by the tokenizer's chat template.

        Raises:
            ApiError: the model has no template, or one that does not take these messages; one of them is no text.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(
                400,
                "this model's tokenizer has no chat template, so that it is not known how a chat is put to it: ask for a completion "
                "(/v1/completions)",
                param="messages",
                code="no_chat_template",
            )
        said = [_plain(message, number) for number, message in enumerate(messages)]
        return await self._aside(self._of_messages, said)

    async def text(self, prompt: Prompt) -> str:
        """What it says."""
        return await self._aside(self._decode, prompt.ids) if prompt.text is None else prompt.text

    async def _aside(self, what: Callable[[Any], _Result], argument: Any) -> _Result:
        async with self._one:
            return await run_in_threadpool(what, argument)

    def _of_text(self, text: str) -> Prompt:
        return Prompt(self._tokenizer(text, verbose=False)["input_ids"], text)

    def _of_messages(self, messages: list[dict[str, str]]) -> Prompt:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ApiError(
                400, f"the model's chat template does not take these messages: {error}", param="messages"
            ) from None
        # the template writes the special tokens itself
        return Prompt(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], text)

    def _decode(self, ids: Sequence[int]) -> str:
        size = len(self._tokenizer)
        known = [token for token in ids if 0 <= token < size]  # the engine refuses others, with a word
        return self._tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _plain(message: Message, number: int) -> dict[str, str]:
    place = f"messages[{number}]"
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise ApiError(
            400, f"{place}: this server calls no tools or functions", param=place, code="unsupported_parameter"
        )
    said = {
        # what OpenAI calls a developer's message for its newer models is what templates know as the system's
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message, f"{place}.content"),
    }
    return said if message.name is None else {**said, "name": message.name}


def _text(message: Message, place: str) -> str:
    if message.content is None:
        raise ApiError(400, f"{place} is missing", param=place, code="missing_required_parameter")
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise ApiError(
                400,
                f"{place} has a part of type {part.type[:40]!r}; this server reads text alone",
                param=place,
                code="unsupported_parameter",
            )
    return "".join(part.text or "" for part in message.content)
