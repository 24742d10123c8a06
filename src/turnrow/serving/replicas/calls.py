"""An HTTP request as plain data, which can be sent to another process and put to an application there."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message

__all__ = ["Call", "ask"]

_GOING_S = 5.0
"""So long an application may take to see that its client has gone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A whole request."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes
    changes: int = 0
    """The last change of the adapters that must have been made before it is answered; see `Board`."""

    @classmethod
    def of(cls, request: Request, body: bytes, changes: int) -> Call:
        """Of a request whose body was read."""
        scope = request.scope
        return cls(
            method=request.method,
            path=scope["path"],
            raw_path=scope.get("raw_path") or scope["path"].encode(),
            query=scope.get("query_string", b""),
            headers=tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            client=None if scope.get("client") is None else (scope["client"][0], scope["client"][1]),
            body=body,
            changes=changes,
        )

    @cached_property
    def model(self) -> str | None:
        """What a generation asks for as ``model``; None if this is no such request, or none that can be read.

        The body is read for it once: what was found goes along to the other process.
        """
        if self.method != "POST" or not self.path.startswith(("/v1/completions", "/v1/chat/")):
            return None
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        model = body.get("model") if isinstance(body, dict) else None
        return model if isinstance(model, str) else None

    @property
    def changes_adapters(self) -> bool:
        """Whether it loads, reloads or unloads one."""
        return self.method in ("POST", "DELETE") and self.path.startswith("/v1/adapters")

    @property
    def scope(self) -> dict[str, Any]:
        """As ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.raw_path,
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


async def ask(app: ASGIApp, call: Call) -> AsyncGenerator[Message, None]:
    """What an ASGI application answers, message by message. Closing this is to the application as if its client had gone."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    unread = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    task = asyncio.ensure_future(app(call.scope, receive, send))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
    finally:
        gone.set()
        await asyncio.wait({task}, timeout=_GOING_S)
        task.cancel()
        for error in await asyncio.gather(task, return_exceptions=True):
            if isinstance(error, Exception):
                _log.error("%s %s went wrong", call.method, call.path[:200], exc_info=error)
