"""What the engine knows of a request, and of each of its answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from turnrow.serving.engine.sampling import TokenStream
from turnrow.serving.handle import Handle
from turnrow.serving.requests import Event, FinishReason, Request, TokenLogprob, Usage
from turnrow.serving.store.adapters import Entry, Version
from turnrow.serving.text import AnswerText

__all__ = ["Job", "Run"]


@dataclass(eq=False)
class Job:
    """A request."""

    request: Request
    handle: Handle
    entry: Entry | None
    """Of its adapter; None for the base model."""
    deadline: float | None
    """By the monotonic clock, s."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    version: Version | None = None
    """Set when its first answer begins to run, for all of them."""
    slot: int | None = None
    """Of its adapter, from then until it has ended."""
    heard: bool = False
    """The engine's thread knows of it."""
    ended: bool = False
    answered: int = 0
    """How many of its answers are whole."""
    runs: list[Run] = field(default_factory=list)

    @property
    def adapter(self) -> str:
        """In words."""
        return "the base model" if self.entry is None else f"adapter {self.entry.name!r}"


@dataclass(eq=False)
class Run:
    """One answer of a request: waiting, or running."""

    job: Job
    index: int
    stream: TokenStream
    text: AnswerText
    overtaken: int = 0
    """How many went first while it waited for a slot."""

    @property
    def id(self) -> str:
        """Unique in the engine."""
        return f"{self.job.handle.request_id}/{self.index}"

    def take(self, token: int, logprob: TokenLogprob | None) -> Event:
        """Take note of the next token; what is to be handed out, with the reason where it was the last."""
        self.stream.append(token)
        request, done = self.job.request, len(self.stream.tokens)
        is_end = token in self.job.ends
        text = "" if is_end else self.text.add(token)
        reason: FinishReason | None = None
        if is_end or self.text.stopped or done == request.max_tokens:
            text += self.text.finish()  # which may hold the rest of a stop string
            reason = "stop" if is_end or self.text.stopped else "length"
        return Event(
            index=self.index,
            text=text,
            token_ids=(token,),
            logprobs=None if request.logprobs is None or logprob is None else (logprob,),
            finish_reason=reason,
            usage=Usage(self.job.handle.prompt_tokens, done) if reason else None,
        )
