"""What clients send: read with limits, checked field by field. Nothing that would change an answer is passed over in silence."""

from __future__ import annotations

import asyncio
import re
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request

from turnrow.errors import near_matches
from turnrow.serving.http.errors import ApiError
from turnrow.serving.requests import Sampling

__all__ = ["ChatBody", "CompletionBody", "GenerationBody", "LoadBody", "Message", "read_body", "read_bytes"]

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

_WITHOUT_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    ]
)
"""Fields of OpenAI's API that say nothing about the answer."""

_CANNOT = {
    "tools": "this server calls no tools",
    "functions": "this server calls no functions",
    "tool_choice": "this server calls no tools",
    "function_call": "this server calls no functions",
    "response_format": "this server writes text alone and holds it to no format",
    "modalities": "this server writes text alone",
    "audio": "this server writes text alone",
    "prediction": "this server predicts no outputs",
    "suffix": "this server writes what follows a prompt, not what lies between two texts",
    "best_of": "this server hands out every answer that it makes: give n",
    "reasoning_effort": "this server's models do not reason apart from their answer",
    "verbosity": "this server has no such setting: ask for it in the prompt",
    "web_search_options": "this server does not search",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "suffix": ("",),
}  # fmt: skip
"""Values of these fields that ask for what the server does anyway."""


_LET_IN = 4
"""Times the longest body."""


class StreamOptions(BaseModel):
    """How a stream is written."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class Body(BaseModel):
    """A JSON object. Fields that it does not have are refused, but for those without effect on what comes out."""

    model_config = _STRICT
    without_effect: ClassVar[frozenset[str]] = frozenset()
    cannot: ClassVar[dict[str, str]] = {}
    forms: ClassVar[dict[str, str]] = {}
    """What a field of several forms must be, in words."""

    def check_others(self) -> None:
        """Look at the fields that the form does not have.

        Raises:
            ApiError: one of them would have to change the answer, or is unknown.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in self.without_effect or value in _HARMLESS.get(name, ()):
                continue
            if name in self.cannot:
                raise ApiError(400, f"{name}: {self.cannot[name]}", param=name, code="unsupported_parameter")
            short = name if len(name) < 64 else f"{name[:60]}..."
            hint = near_matches(short, [*type(self).model_fields, *self.without_effect])
            raise ApiError(400, f"there is no field {short!r}{hint}", param=short, code="unknown_parameter")


class GenerationBody(Body):
    """The fields that completions and chats share, OpenAI's and (the last five) our own."""

    without_effect = _WITHOUT_EFFECT
    cannot = _CANNOT
    forms = {
        "stop": "a text, or a list of texts",
        "prompt": "a text, a list of tokens (whole numbers), or a list of either",
        "logit_bias": "an object from tokens to numbers",
    }

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    def sampling(self) -> Sampling:
        """How tokens are chosen; what is not said is as with OpenAI.

        Raises:
            ApiError: a key of `logit_bias` is no token.
            UserError: a value is out of range.
        """
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = 0 if self.top_k == -1 else self.top_k  # -1 for all, as with other servers
        return Sampling(logit_bias=self._bias(), **given)

    def stops(self) -> list[str]:
        """The stop strings; an empty one, which some clients send for none, is none."""
        return [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or ())

    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage.

        Raises:
            ApiError: `stream_options` without a stream.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for streams alone: set stream to true", param="stream_options")
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _bias(self) -> dict[int, float]:
        bias = self.logit_bias or {}
        wrong = next((token for token in bias if not re.fullmatch(r"[0-9]{1,9}", token)), None)
        if wrong is not None:
            raise ApiError(
                400, f"logit_bias has the token {wrong[:40]!r}; it must be a whole number", param="logit_bias"
            )
        return {int(token): value for token, value in bias.items()}


class CompletionBody(GenerationBody):
    """Of ``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    def check_others(self) -> None:
        """See `Body.check_others`."""
        super().check_others()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, f"best_of: {_CANNOT['best_of']}", param="best_of", code="unsupported_parameter")


class Part(BaseModel):
    """A part of what is said."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """Something said in a chat."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class ChatBody(GenerationBody):
    """Of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def most_tokens(self) -> int | None:
        """How many tokens an answer may have, if that is said.

        Raises:
            ApiError: it is said twice, and not the same.
        """
        said = {value for value in (self.max_completion_tokens, self.max_tokens) if value is not None}
        if len(said) > 1:
            raise ApiError(
                400, "max_tokens and max_completion_tokens differ: give one of them", param="max_completion_tokens"
            )
        return next(iter(said), None)

    def wanted_logprobs(self) -> int | None:
        """How many log-probabilities a token gets beside its own; None for none at all.

        Raises:
            ApiError: `top_logprobs` without `logprobs`.
        """
        if not self.logprobs:
            if self.top_logprobs is not None:
                raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
            return None
        return self.top_logprobs or 0


class LoadBody(Body):
    """Of ``POST /v1/adapters``."""

    name: str
    path: str | None = None


_Body = TypeVar("_Body", bound=Body)


async def read_body(request: Request, form: type[_Body], max_bytes: int, timeout_s: float) -> _Body:
    """Read a request's body, a JSON object of the given form.

    Raises:
        ApiError: 413 it is too long; 408 it comes in too slowly; 400 it is no JSON, or not of that form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            400,
            f"the body is said to be {kind[:60] or 'nothing'!r}; send JSON, with the header Content-Type: application/json",
        )
    data = await read_bytes(request, max_bytes, timeout_s)
    try:
        body = form.model_validate_json(data)
    except ValidationError as error:
        raise _plain(form, error) from None
    body.check_others()
    return body


async def read_bytes(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Read a request's body as it is.

    Raises:
        ApiError: 413 it is too long; 408 it comes in too slowly; 400 the client went away.
    """
    try:
        return await asyncio.wait_for(_read(request, max_bytes), timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body did not come in within {timeout_s:g} s", headers={"Connection": "close"}
        ) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    data = bytearray()
    length = 0
    declared = request.headers.get("content-length", "0")
    # a body that is somewhat too long is let in and forgotten: most clients listen only after they have sent all
    most = _LET_IN * max_bytes
    if not declared.isdigit() or int(declared) <= most:
        try:
            async for chunk in request.stream():
                length += len(chunk)
                if length > most:
                    break
                if length <= max_bytes:
                    data += chunk
        except ClientDisconnect:
            raise ApiError(400, "the client went away before its body was whole") from None
    else:
        length = int(declared)
    if length > max_bytes:
        raise ApiError(
            413,
            f"the body is longer than {max_bytes:,} bytes, the most that this server takes",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    return bytes(data)


def _plain(form: type[Body], error: ValidationError) -> ApiError:
    """The first thing that is wrong, in words; what the client sent is not repeated."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "it cannot be read"))
        return ApiError(400, f"the body is no JSON: {reason}", code="invalid_json")
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not re.fullmatch(r"[A-Za-z0-9_]{1,64}", part) or part in ("str", "int", "float", "bool"):
            break  # which of several forms was tried
        else:
            place += f".{part}" if place else part
    if not place:
        return ApiError(400, "the body must be a JSON object")
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing", param=place, code="missing_required_parameter")
    wanted = form.forms.get(str(first["loc"][0]))
    text = f"must be {wanted}" if wanted else _lower(first["msg"])
    return ApiError(400, f"{place}: {text}", param=place, code="invalid_type")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
