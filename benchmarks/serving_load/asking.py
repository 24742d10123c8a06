"""Requests drawn by a seed, and clients that send them: so many at a time, some reading a stream, some going away in the middle."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

__all__ = ["PROMPTS", "Ask", "Outcome", "ask_all", "draw", "zipf_weights"]

PROMPTS = (
    "It was",
    "The captain looked at the sea and",
    "My dear sister,",
    "When the old man had finished his dinner he",
    "She opened the letter, and as she read it her face",
    "There was no moon that night. The road before us was dark, the horses were tired, and not one of us",
    "I have never spoken of what I saw in that house. But now that I am old, and those who could be hurt by it are dead, I will",
    '"Tell me," said he,',
)

_LENGTHS = (8, 16, 24, 40)
"""Tokens of answers."""

_STREAMED = 0.5
"""The share of requests that are answered as a stream."""


@dataclass(frozen=True)
class Ask:
    """A request."""

    adapter: str
    prompt: int
    """Its place in `PROMPTS`."""
    max_tokens: int
    stream: bool
    leaves: bool = False
    """The client goes away after the first piece of the stream."""


@dataclass(frozen=True)
class Outcome:
    """What became of it. Times are s since the load began."""

    ask: Ask
    began: float
    ended: float
    first: float | None
    """When the first piece of a stream came."""
    status: int | None
    """200, the status of an error, or None if the connection or the stream broke off."""
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    error: str | None = None
    left: bool = False
    """The client went away, as it was meant to."""


def zipf_weights(count: int, exponent: float) -> list[float]:
    """P(rank k) ~ k^-exponent, for k = 1 to `count`."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def draw(names: Sequence[str], count: int, *, exponent: float, seed: int, leaving: float = 0.0) -> list[Ask]:
    """Draw requests.

    Args:
        names: of the adapters. Which are popular is drawn, too.
        count: of requests.
        exponent: of Zipf's law.
        seed: gives the same requests again.
        leaving: the share of clients that go away in the middle of their stream.
    """
    chance = random.Random(seed)
    ranked = chance.sample(list(names), len(names))
    cumulated = list(accumulate(zipf_weights(len(names), exponent)))
    asks = []
    for adapter in chance.choices(ranked, cum_weights=cumulated, k=count):
        leaves = chance.random() < leaving
        stream = chance.random() < _STREAMED or leaves
        asks.append(Ask(adapter, chance.randrange(len(PROMPTS)), chance.choice(_LENGTHS), stream, leaves))
    return asks


def ask_all(url: str, asks: Sequence[Ask], at_once: int, timeout: float = 300.0) -> list[Outcome]:
    """Send all requests by the openai client, `at_once` of them at a time, in their order; nothing is tried twice."""
    return asyncio.run(_ask_all(url, asks, at_once, timeout))


async def _ask_all(url: str, asks: Sequence[Ask], at_once: int, timeout: float) -> list[Outcome]:
    from openai import AsyncOpenAI

    outcomes: dict[int, Outcome] = {}
    waiting = iter(enumerate(asks))
    start = time.monotonic()

    async def client() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout) as openai:
            for place, one in waiting:
                outcomes[place] = await _ask(openai, one, start)

    await asyncio.gather(*(client() for _ in range(min(at_once, len(asks)))))
    return [outcomes[place] for place in range(len(asks))]


async def _ask(client: Any, ask: Ask, start: float) -> Outcome:
    from openai import APIError, APIStatusError

    now = lambda: time.monotonic() - start  # noqa: E731
    began, first, text, reason, tokens, left = now(), None, "", None, 0, False
    body = {
        "model": ask.adapter,
        "prompt": PROMPTS[ask.prompt],
        "max_tokens": ask.max_tokens,
        "temperature": 0,
    }
    try:
        if not ask.stream:
            answer = await client.completions.create(**body)
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
            tokens = answer.usage.completion_tokens
        else:
            stream = await client.completions.create(**body, stream=True, stream_options={"include_usage": True})
            async for chunk in stream:
                first = now() if first is None else first
                if ask.leaves:
                    left = True
                    await stream.close()
                    break
                for choice in chunk.choices:
                    text += choice.text
                    reason = choice.finish_reason or reason
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
        return Outcome(ask, began, now(), first, 200, text, reason, tokens, left=left)
    except APIStatusError as error:
        return Outcome(ask, began, now(), first, error.status_code, error=str(error))
    except APIError as error:  # no connection, or an error within a stream
        return Outcome(ask, began, now(), first, None, text, error=f"{type(error).__name__}: {error}")
