"""What stands before the replicas: reads a request, lets one of them answer it, and hands the answer on as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from turnrow.serving.http import ServerSettings
from turnrow.serving.http.bodies import read_bytes
from turnrow.serving.http.connection import ClientGone, while_connected
from turnrow.serving.http.errors import ApiError
from turnrow.serving.replicas.board import Board, Change
from turnrow.serving.replicas.calls import Call
from turnrow.serving.replicas.figures import joined

__all__ = ["Ask", "Gateway"]

Ask = Callable[[Call, "str | None"], AsyncGenerator[Message, None]]
"""Put a call to a replica: to the one that was asked for this adapter before, if one is named. It raises `ApiError` where none
can be asked, or the one that was asked is lost."""

_ENDING = "the server is shutting down"


class Gateway:
    """There is one, with the board, so that changes of adapters come one after the other. It passes on bytes: keys and what bodies say are
    the replicas' matter.

    Args:
        ask: puts a call to a replica.
        settings: of the HTTP side.
        replicas: how many there should be.
    """

    def __init__(self, ask: Ask, settings: ServerSettings, replicas: int) -> None:
        self._ask, self._settings, self._wanted = ask, settings, replicas
        self.board = Board()
        self._known: set[str] = set()
        """Adapters that were answered with: what clients merely name is not kept."""
        self._changing = asyncio.Lock()
        self._relays: set[_Relay] = set()
        self._draining = False

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        path = request.url.path
        if path == "/health":
            return self._health()
        if path == "/metrics":
            texts = {report.replica: report.metrics for report in self.board.reports()}
            return Response(joined(texts), media_type="text/plain; version=0.0.4")
        try:
            return await self._respond(request)
        except ApiError as error:
            return error.response()

    async def drain(self) -> None:
        """Take no more requests, and wait until those that were taken are answered."""
        self._draining = True
        while self._relays:
            await asyncio.gather(*(relay.ended.wait() for relay in self._relays))

    async def break_off(self) -> None:
        """Give up what is being answered, with an error to each client."""
        self._draining = True
        for relay in list(self._relays):
            relay.break_off()
        await self.drain()

    async def open_requests(self) -> int:
        """How many are being answered."""
        return len(self._relays)

    async def _respond(self, request: Request) -> Response:
        if self._draining:
            raise ApiError(503, _ENDING, code="unavailable")
        settings = self._settings
        body = await read_bytes(request, settings.max_body_bytes, settings.body_timeout_s)
        call = Call.of(request, body, self.board.number)
        if call.changes_adapters:
            # to its end, also if the client goes: the replicas must not come to differ
            return await asyncio.shield(asyncio.ensure_future(self._change(call)))
        model = call.model
        relay = _Relay(self._ask(call, model if model in self._known else None), self._relays)
        if model is not None:
            relay.on_success = lambda: self._known.add(model)
        return relay

    async def _change(self, call: Call) -> Response:
        """Let one replica make a change; the others follow before their next answer."""
        async with self._changing:
            start, body = await _whole(self._ask(call, None))
            if start["status"] < 300:
                adapter = json.loads(body)
                change = Change(adapter["id"], None if adapter.get("deleted") else adapter["path"])
                self.board.record(change)
                if change.folder is None:
                    self._known.discard(change.name)
        response = Response(body, start["status"])
        response.raw_headers = list(start["headers"])
        return response

    def _health(self) -> Response:
        reports = self.board.reports()
        serving = sum(report.state == "running" for report in reports)
        state = "draining" if self._draining else "running" if serving else "starting"
        described = [
            {
                "id": r.replica,
                "status": r.state,
                "running": r.running,
                "waiting": r.waiting,
                "adapters": r.adapters,
                "max_length": r.max_length,
            }
            for r in reports
        ]
        body = {"status": state, "replicas": described, "wanted": self._wanted}
        return JSONResponse(body, 200 if state == "running" else 503)


async def _to_the_end(messages: AsyncGenerator[Message, None]) -> AsyncGenerator[Message, None]:
    """The messages of an answer, which must not end before it does."""
    ended = False
    async for message in messages:
        ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        yield message
    if not ended:
        raise ApiError(
            503,
            "the replica that was answering broke off; another try may go to another one",
            code="replica_lost",
            headers={"Retry-After": "1"},
        )


async def _whole(messages: AsyncGenerator[Message, None]) -> tuple[Message, bytes]:
    """The start of an answer, and its body."""
    async with contextlib.aclosing(messages):
        start, *rest = [message async for message in _to_the_end(messages)]
    return start, b"".join(message.get("body", b"") for message in rest)


class _Relay(Response):
    """Hands on an answer: a stream as it comes, any other when it is whole. The client's going ends the work; the replica's going
    ends the answer with an error.

    Args:
        messages: of a replica.
        among: the relays that run; this one is there until its end.
    """

    def __init__(self, messages: AsyncGenerator[Message, None], among: set[_Relay]) -> None:
        super().__init__()
        self._messages, self._among = messages, among
        self.on_success: Callable[[], Any] = lambda: None
        self.ended = asyncio.Event()
        self._start: Message | None = None
        """Of the answer, once it went out."""
        self._work: asyncio.Future[None] | None = None
        self._broken_off = False
        among.add(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        handing_on = self._hand_on(send)
        try:
            self._work = asyncio.ensure_future(while_connected(receive, handing_on))
            if self._broken_off:
                self._work.cancel()
            await self._work
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if not self._broken_off:
                raise
            await self._end(ApiError(503, _ENDING, code="unavailable"), scope, receive, send)
        except ApiError as error:
            await self._end(error, scope, receive, send)
        finally:
            handing_on.close()  # if it never began
            await self._messages.aclose()
            self._among.discard(self)
            self.ended.set()

    def break_off(self) -> None:
        """Read no further, and tell the client."""
        self._broken_off = True
        if self._work is not None:
            self._work.cancel()

    async def _hand_on(self, send: Send) -> None:
        async with contextlib.aclosing(_to_the_end(self._messages)) as messages:
            start = await anext(messages)
            if start["status"] < 300:
                self.on_success()
            if not _is_stream(start):
                # once it has begun, the loss of its replica could be told only by breaking it off
                rest = [message async for message in messages]
                self._start = start
                for message in (start, *rest):
                    await send(message)
                return
            self._start = start
            await send(start)
            async for message in messages:
                await send(message)

    async def _end(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell the client that there is no more, in a way for which it is not too late."""
        if self._start is None:
            await error.response()(scope, receive, send)
        elif _is_stream(self._start):
            data = f"data: {json.dumps(error.body)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": False})
        else:  # between the two messages of an answer; only its breaking off can be told
            raise error


def _is_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"]
    )
