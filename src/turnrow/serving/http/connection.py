"""Clients that go away: what is done for them ends at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

__all__ = ["ClientGone", "EventStream", "while_connected"]

_Result = TypeVar("_Result")


class ClientGone(Exception):
    """The client closed its connection."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do `work`, and give it up as soon as the client goes.

    Args:
        receive: of a request whose body was read.
        work: is cancelled.

    Raises:
        ClientGone: it went before the work was done.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: texts, each an event.
        on_gone: called if the client goes before the last.
        on_end: called at the end, whatever it was, also if nothing was sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str, None], *, on_gone: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        # proxies must hand on what they get as they get it
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._on_gone, self._on_end = on_gone, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await while_connected(receive, self.stream_response(send))
        except ClientGone:
            self._on_gone()
        finally:
            self._on_end()
            await self._events.aclose()
