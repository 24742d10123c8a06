"""What completions and chats do alike: from a checked body to an answer, whole or as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from turnrow.errors import UserError
from turnrow.serving.http.answers import Answers
from turnrow.serving.http.bodies import GenerationBody
from turnrow.serving.http.connection import ClientGone, EventStream, while_connected
from turnrow.serving.http.errors import ApiError, error_of
from turnrow.serving.http.pieces import AnswerPieces, ShownToken
from turnrow.serving.http.prompts import Prompt
from turnrow.serving.http.service import Record, Service, record_of, service_of
from turnrow.serving.requests import Event, Request

__all__ = ["Choice", "Form", "Wanted", "requests_of", "respond"]


@dataclass(frozen=True)
class Choice:
    """An answer, or what is new of one."""

    index: int
    text: str
    tokens: Sequence[ShownToken] | None
    """None if no log-probabilities were asked for."""
    finish_reason: str | None
    is_first: bool = False
    """Nothing of this answer went out before."""


class Form(Protocol):
    """How a route writes answers."""

    prefix: str
    """Of ids."""
    whole: str
    """`object` of a whole answer."""
    chunk: str
    """`object` of a piece of a stream."""

    def of_whole(self, choice: Choice) -> dict[str, Any]:
        """A whole answer."""
        ...

    def of_chunk(self, choice: Choice) -> list[dict[str, Any]]:
        """Pieces that say what is new of an answer; none if that is nothing that a client would see."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What a client wants."""

    body: GenerationBody
    requests: Sequence[Request]
    form: Form
    prefixes: Sequence[str] = ()
    """Texts that the answers to each prompt begin with, if prompts are repeated."""

    def prefix(self, choice: int) -> str:
        """Of a choice."""
        return self.prefixes[choice // self.requests[0].n] if self.prefixes else ""


def requests_of(
    service: Service,
    body: GenerationBody,
    prompts: Sequence[Prompt],
    *,
    adapter: str,
    max_tokens: int | None,
    logprobs: int | None,
    param: str,
) -> list[Request]:
    """The engine's requests, one for each prompt.

    Args:
        max_tokens: of an answer; None for as many as there is room for.
        param: the field with the prompts.

    Raises:
        ApiError: a value is out of range, a prompt is too long, or there are more answers than can wait.
    """
    most = service.engine.max_length
    n = 1 if body.n is None else body.n
    queue = service.engine.limits.max_queue
    try:
        requests = [
            Request(
                prompt.ids,
                adapter=adapter,
                max_tokens=max(1, most - len(prompt.ids)) if max_tokens is None else max_tokens,
                n=n,
                sampling=body.sampling(),
                stop=body.stops(),
                stop_token_ids=body.stop_token_ids or (),
                ignore_eos=bool(body.ignore_eos),
                logprobs=logprobs,
                timeout_s=service.settings.request_timeout_s,
            )
            for prompt in prompts
        ]
    except UserError as error:
        raise error_of(error, fields=frozenset(type(body).model_fields)) from None
    for request in requests:
        if len(request.prompt_ids) + request.max_tokens > most:
            raise ApiError(
                400,
                f"{param} has {len(request.prompt_ids)} tokens and the answer may have {request.max_tokens}; together they may be "
                f"{most} here",
                param=param,
                code="context_length_exceeded",
            )
    if len(prompts) * n > queue:
        raise ApiError(
            400,
            f"these are {len(prompts) * n} answers; a request may ask for {queue} here",
            param="n",
            code="too_many_answers",
        )
    return requests


async def respond(http: HttpRequest, wanted: Wanted) -> Response:
    """Let the engine answer, and write it down.

    Raises:
        ApiError: the engine did not accept it, or failed.
    """
    service, record = service_of(http), record_of(http)
    usage_in_stream = wanted.body.includes_usage()
    writer = _Writer(service, record, wanted)
    try:
        if not wanted.body.stream:
            return JSONResponse(await while_connected(http.receive, writer.whole()))
        # the first event is waited for, so that what fails before it is told by a status
        first = await while_connected(http.receive, writer.begin())
    except ClientGone:
        writer.answers.cancel()
        record.status = 499
        return Response(status_code=499)  # which nobody reads
    except BaseException:
        writer.answers.cancel()
        raise
    return EventStream(writer.stream(first, usage_in_stream), on_gone=writer.gone, on_end=writer.answers.cancel)


class _Writer:
    def __init__(self, service: Service, record: Record, wanted: Wanted) -> None:
        self._service, self._record, self._wanted = service, record, wanted
        self.answers = Answers(service.engine, wanted.requests, frozenset(type(wanted.body).model_fields))
        self._events = self.answers.events()
        self._began = time.monotonic()
        self._created = int(time.time())
        self._id = f"{wanted.form.prefix}-{record.request_id}"
        ends = frozenset(wanted.requests[0].stop_token_ids)
        if not wanted.requests[0].ignore_eos:
            ends |= service.engine.end_tokens
        self._pieces = [
            AnswerPieces(service.texts, ends, len(wanted.prefix(choice))) for choice in range(self.answers.choices)
        ]
        record.prompt_tokens = self.answers.prompt_tokens

    def gone(self) -> None:
        """The client went before the end of its stream."""
        self._record.status = 499

    async def whole(self) -> dict[str, Any]:
        """The answers once all of them have ended."""
        texts = [self._wanted.prefix(choice) for choice in range(self.answers.choices)]
        tokens: list[list[ShownToken]] = [[] for _ in texts]
        reasons: list[str | None] = [None] * len(texts)
        async with aclosing(self._events) as events:
            async for index, event in events:
                self._note(event)
                texts[index] += event.text
                tokens[index] += self._pieces[index].add(event)
                reasons[index] = event.finish_reason
        choices = [
            self._wanted.form.of_whole(Choice(index, texts[index], self._shown(tokens[index]), reasons[index]))
            for index in range(len(texts))
        ]
        return self._head(self._wanted.form.whole) | {"choices": choices, "usage": self._usage()}

    async def begin(self) -> tuple[int, Event]:
        """The first event."""
        first = await anext(self._events)
        return first

    async def stream(self, first: tuple[int, Event], with_usage: bool) -> AsyncGenerator[str, None]:
        """All events from the first on, as texts to be sent."""
        head = self._head(self._wanted.form.chunk)
        if with_usage:
            head["usage"] = None
        begun: set[int] = set()
        try:
            async with aclosing(self._events) as events:
                for chunk in self._chunks(*first, begun):
                    yield _sent(head | {"choices": [chunk]})
                async for index, event in events:
                    for chunk in self._chunks(index, event, begun):
                        yield _sent(head | {"choices": [chunk]})
            if with_usage:
                yield _sent(head | {"choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            self._record.status = error.status
            yield _sent(error.body)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _chunks(self, index: int, event: Event, begun: set[int]) -> list[dict[str, Any]]:
        self._note(event)
        is_first = index not in begun
        begun.add(index)
        text = (self._wanted.prefix(index) if is_first else "") + event.text
        tokens = self._shown(self._pieces[index].add(event))
        return self._wanted.form.of_chunk(Choice(index, text, tokens, event.finish_reason, is_first))

    def _note(self, event: Event) -> None:
        if not self._record.completion_tokens:
            waited = time.monotonic() - self._began
            self._service.metrics.first_token.labels(self._record.model_kind).observe(waited)
        self._record.completion_tokens += len(event.token_ids)

    def _shown(self, tokens: list[ShownToken]) -> list[ShownToken] | None:
        return None if self._wanted.requests[0].logprobs is None else tokens

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._wanted.body.model,
            "system_fingerprint": self._service.fingerprint(self.answers.adapter_version),
        }

    def _usage(self) -> dict[str, int]:
        read, written = self._record.prompt_tokens, self._record.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _sent(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
