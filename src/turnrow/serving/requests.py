"""What a client asks for, and what it gets: plain data, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from turnrow.errors import UserError
from turnrow.serving.store.names import BASE

__all__ = ["Event", "FinishReason", "QueueFull", "Request", "RequestFailed", "Sampling", "TokenLogprob", "Usage"]

FinishReason = Literal["stop", "length"]
"""It ended with an end-of-sequence token, a stop token or a stop string; or it was as long as asked for."""

_MOST_STOPS = 16
_MOST_LOGPROBS = 20
_MOST_CHOICES = 128


class QueueFull(UserError):
    """Too many requests wait. `retry_after` says in how many seconds it is worth another try."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests wait already, and no more can: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class RequestFailed(Exception):
    """A request that was accepted and came to no good end."""

    def __init__(
        self, kind: Literal["cancelled", "timeout", "adapter", "not_finite", "stopped", "engine"], text: str
    ) -> None:
        super().__init__(text)
        self.kind = kind
        """cancelled: by the client. timeout: its deadline passed. adapter: its adapter could not be loaded. not_finite: its adapter
        made the model compute NaN or infinite logits. stopped: the engine was stopped. engine: the engine broke down."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. The settings work in the order in which they stand here."""

    presence_penalty: float = 0.0
    """Taken once from the logit of every token that was generated before."""
    frequency_penalty: float = 0.0
    """Taken from it as often as it was generated."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or the text are divided by it, negative ones multiplied."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens."""
    temperature: float = 1.0
    """0 takes the most likely token (greedy), and what follows has no effect."""
    top_k: int = 0
    """Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the most likely one."""
    seed: int | None = None
    """With a seed, a request gets the same text again, whatever else is served beside it."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _whole("top_k", self.top_k, 0)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        for token, bias in self.logit_bias.items():
            _whole("a token of logit_bias", token, 0)
            _number(f"logit_bias[{token}]", bias, -100, 100)


@dataclass(frozen=True)
class Request:
    """One prompt, with one or several answers."""

    prompt_ids: Sequence[int]
    """Tokens of the prompt, one or more."""
    adapter: str = BASE
    """Name of an adapter in the store, or `BASE`."""
    max_tokens: int = 16
    """The most tokens of an answer."""
    n: int = 1
    """How many answers."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    """An answer ends before the first of these texts; it is not part of the answer."""
    stop_token_ids: Sequence[int] = ()
    """An answer ends with one of these tokens, or of the model's end-of-sequence tokens; its text has none of them."""
    ignore_eos: bool = False
    """Go on after end-of-sequence tokens."""
    logprobs: int | None = None
    """None for no log-probabilities; 0 for those of the tokens chosen; k for the k most likely beside."""
    timeout_s: float | None = None
    """Fail after so many seconds, counted from its submission."""

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, str):
            raise UserError(f"adapter is {self.adapter!r}; it must be a name")
        if not len(self.prompt_ids):
            raise UserError(
                "the prompt has no tokens: begin with at least one, such as the beginning-of-sequence token"
            )
        _whole("max_tokens", self.max_tokens, 1)
        _whole("n", self.n, 1, _MOST_CHOICES)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, _MOST_LOGPROBS)
        if isinstance(self.stop, str) or len(self.stop) > _MOST_STOPS:
            raise UserError(f"stop is {self.stop!r}; it must be a list of up to {_MOST_STOPS} texts")
        text: Any
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop has {text!r}; it must be a text that is not empty")
        for token in self.stop_token_ids:
            _whole("a token of stop_token_ids", token, 0)
        if self.timeout_s is not None:
            _number("timeout_s", self.timeout_s, 0, 1e9, above=True)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities (natural) at one place of an answer, by the model itself: before penalties, bias and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, most likely first."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, or of one of its answers."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Event:
    """What is new of one answer."""

    index: int
    """Which of the n answers."""
    text: str = ""
    """The text that follows that of the events before. Never ends within a character."""
    token_ids: tuple[int, ...] = ()
    """The new tokens. Their text may come with a later event."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for every new token, if asked for."""
    finish_reason: FinishReason | None = None
    """Set in the last event of an answer."""
    usage: Usage | None = None
    """Of this answer, with its `finish_reason`."""


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        raise UserError(
            f"{name} is {value!r}; it must be a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"
        )


def _whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"{name} is {value!r}; it must be a whole number {allowed}")
