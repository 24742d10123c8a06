"""The requests of one HTTP request: all accepted or none, their events in one stream, given up together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from turnrow.errors import UserError
from turnrow.serving.engine import Engine
from turnrow.serving.handle import Handle
from turnrow.serving.http.errors import error_of
from turnrow.serving.requests import Event, Request, RequestFailed

__all__ = ["Answers"]

_GRACE_S = 5.0
"""So much later than the engine we give up ourselves: it may hang in a step."""


class Answers:
    """Choices are numbered through: those of the first request, of the second, and so on.

    Args:
        engine: serves the requests.
        requests: all with the same `n` and `timeout_s`.
        fields: names of the client's request, for errors.

    Raises:
        ApiError: one of them was not accepted; then none is.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], fields: frozenset[str]) -> None:
        self._requests, self._fields = requests, fields
        self._handles: list[Handle] = []
        self._late = False
        try:
            for request in requests:
                self._handles.append(engine.submit(request))
        except (UserError, RequestFailed) as error:
            self.cancel()
            raise error_of(error, fields=fields, accepted=False) from error

    @property
    def choices(self) -> int:
        """How many there are."""
        return len(self._requests) * self._requests[0].n

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(handle.prompt_tokens for handle in self._handles)

    @property
    def adapter_version(self) -> int | None:
        """Of the adapter, once the first request has begun to run."""
        return self._handles[0].adapter_version

    def cancel(self) -> None:
        """Give all of them up, as far as they have not ended."""
        for handle in self._handles:
            if not handle.done:
                handle.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The number of a choice, and what is new of it. If one request fails, the others are given up.

        Raises:
            ApiError: one failed.
        """
        timeout = self._requests[0].timeout_s
        watch = (
            None
            if timeout is None
            else asyncio.get_running_loop().call_later(timeout + _GRACE_S, self._give_up_late, timeout)
        )
        try:
            async for choice, event in self._one() if len(self._handles) == 1 else self._merged():
                yield choice, event
        except RequestFailed as error:
            raise error_of(error, fields=self._fields, late=self._late) from error
        finally:
            if watch is not None:
                watch.cancel()
            self.cancel()

    async def _one(self) -> AsyncGenerator[tuple[int, Event], None]:
        async for event in self._handles[0]:
            yield event.index, event

    async def _merged(self) -> AsyncGenerator[tuple[int, Event], None]:
        arrived: asyncio.Queue[tuple[int, Event | RequestFailed | None]] = asyncio.Queue()

        async def read(place: int, handle: Handle) -> None:
            try:
                async for event in handle:
                    arrived.put_nowait((place * self._requests[0].n + event.index, event))
                arrived.put_nowait((place, None))
            except RequestFailed as error:
                arrived.put_nowait((place, error))

        readers = [asyncio.ensure_future(read(place, handle)) for place, handle in enumerate(self._handles)]
        try:
            left = len(readers)
            while left:
                choice, event = await arrived.get()
                if isinstance(event, RequestFailed):
                    raise event
                if event is None:
                    left -= 1
                else:
                    yield choice, event
        finally:
            for reader in readers:
                reader.cancel()

    def _give_up_late(self, timeout: float) -> None:
        self._late = True
        self.cancel()
