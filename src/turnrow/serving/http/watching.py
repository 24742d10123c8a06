"""One line of log and one count for every request. Neither prompts nor answers are written, nor anything else of a body but the model's name."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turnrow.serving.http.service import Record, Service

__all__ = ["Watch"]

_log = logging.getLogger("turnrow.serving.http.access")

_QUIET = ("/health", "/metrics")
"""Asked every few seconds by machines: logged only where they go wrong."""

_ID = re.compile(rb"[A-Za-z0-9-]{16,64}")


class Watch:
    """Wraps the application; gives each request its record, and its answer the header ``x-request-id``."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, and take note."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope["turnrow"] = Record(_request_id(scope))
        began = time.perf_counter()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._note(scope, record, record.status or status, time.perf_counter() - began)

    def _note(self, scope: Scope, record: Record, status: int, seconds: float) -> None:
        # the path as it is written in the routes: a client may ask for any path it likes
        route = getattr(scope.get("route"), "path", "other")
        metrics = self._service.metrics
        metrics.requests.labels(route, record.model_kind, str(status)).inc()
        metrics.latency.labels(route).observe(seconds)
        if route in _QUIET and status < 400:
            return
        client = scope["client"][0] if scope.get("client") else "-"
        text = f"{client} {scope['method']} {scope['path'][:200]!r} {status} {seconds:.3f} s"
        if record.model is not None:
            text += f", model {record.model}, tokens {record.prompt_tokens} + {record.completion_tokens}"
        _log.info("%s, %s", text, record.request_id)


def _request_id(scope: Scope) -> str:
    """The number that a proxy before us gave to the request, else one of our own."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
