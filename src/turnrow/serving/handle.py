"""The client's end of a request: events out, a cancel in; for threads and for asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from turnrow.serving.requests import Event, FinishReason, RequestFailed, TokenLogprob

__all__ = ["Answer", "Handle"]


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason


class Handle:
    """A request that was accepted.

    Events are read by one reader: ``for event in handle`` in a thread, ``async for event in handle`` in a task, or all at once by
    `result` and `result_async`. Iteration ends after the last answer's last event; a request that fails raises `RequestFailed` there.
    A loop that is left may be taken up again, by another one or by `result`. A reader that does not come back should `cancel`.
    """

    def __init__(self, request_id: str, prompt_tokens: int, answers: int, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.submitted = time.monotonic()
        """s, by the monotonic clock."""
        self.adapter_version: int | None = None
        """Of the adapter, once the request has begun to run; None for the base model."""
        self._cancel = cancel
        self._left = answers
        self._condition = threading.Condition()
        self._events: deque[Event] = deque()
        self._error: RequestFailed | None = None
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    # --- for the client ----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Give the request up: its place is free before the next step, and its reader gets `RequestFailed`. Safe to call again."""
        self._cancel()

    @property
    def done(self) -> bool:
        """Whether the engine is through with it; events may still wait to be read."""
        with self._condition:
            return self._error is not None or self._left == 0

    def __iter__(self) -> Iterator[Event]:
        """Read events, waiting for them in this thread."""
        while True:
            with self._condition:
                self._condition.wait_for(self._is_ready)
                event = self._take()
            if event is None:
                return
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Read events, waiting for them in this task."""
        signal = asyncio.Event()
        while True:
            with self._condition:
                ready = self._is_ready()
                event = self._take() if ready else None
                if not ready:
                    signal.clear()
                    self._waiting = asyncio.get_running_loop(), signal
            if event is not None:
                yield event
            elif ready:
                return
            else:
                await signal.wait()

    def result(self, timeout: float | None = None) -> list[Answer]:
        """Wait for all answers.

        Args:
            timeout: s; after it the request is cancelled.

        Raises:
            TimeoutError: it took longer.
            RequestFailed: it failed.
        """
        if timeout is not None:
            with self._condition:
                through = self._condition.wait_for(lambda: self._error is not None or self._left == 0, timeout)
            if not through:
                self.cancel()
                raise TimeoutError(f"request {self.request_id} took longer than {timeout:g} s")
        return _answers(list(self))

    async def result_async(self) -> list[Answer]:
        """As `result`, in a task."""
        return _answers([event async for event in self])

    @property
    def error(self) -> RequestFailed | None:
        """Why it failed, if it did."""
        with self._condition:
            return self._error

    # --- for the engine ----------------------------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Hand out an event."""
        with self._condition:
            self._events.append(event)
            self._left -= event.finish_reason is not None
            self._wake()

    def fail(self, error: RequestFailed) -> None:
        """End it with an error; only the first counts, and none after the last answer."""
        with self._condition:
            if self._error is None and self._left:
                self._error = error
                self._wake()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        return bool(self._events) or self._error is not None or self._left == 0

    def _take(self) -> Event | None:
        """The next event, None at the end. One at a time: a reader may stop between any two, and go on later."""
        if self._events:
            return self._events.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wake(self) -> None:
        self._condition.notify_all()
        if self._waiting is not None:
            loop, signal = self._waiting
            self._waiting = None
            with suppress(RuntimeError):  # the reader's loop was closed: nobody reads on
                loop.call_soon_threadsafe(signal.set)


def _answers(events: list[Event]) -> list[Answer]:
    answers = []
    for index in sorted({event.index for event in events}):
        own = [event for event in events if event.index == index]
        reason = own[-1].finish_reason
        assert reason is not None  # an answer ends with its reason
        logprobs = None if own[0].logprobs is None else tuple(one for event in own for one in event.logprobs or ())
        token_ids = tuple(token for event in own for token in event.token_ids)
        answers.append(Answer(index, "".join(event.text for event in own), token_ids, logprobs, reason))
    return answers
