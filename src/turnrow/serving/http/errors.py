"""What goes wrong, in the form of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from turnrow.errors import UserError
from turnrow.serving.requests import QueueFull, RequestFailed

__all__ = ["ApiError", "add_handlers", "error_of"]

_log = logging.getLogger(__name__)

NO_RETRY = {"x-should-retry": "false"}
"""Tells the openai client that another try would end the same."""


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: for the user of the client.
        kind: `type` in OpenAI's form.
        param: the field of the request that is at fault.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """As JSON values."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As an answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def error_of(
    error: UserError | RequestFailed,
    *,
    fields: frozenset[str] = frozenset(),
    accepted: bool = True,
    late: bool = False,
) -> ApiError:
    """What the engine said, for a client.

    Args:
        error: of the engine.
        fields: of the request; where the message begins with the name of one, that is the one at fault.
        accepted: the engine had taken the request. Otherwise a break-down is one of before, and another server may do better.
        late: the request was cancelled by us for it took too long.
    """
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(round(error.retry_after))}
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, UserError):
        word = str(error).partition(" ")[0].partition("[")[0]
        return ApiError(400, str(error), param=word if word in fields else None)
    if error.kind == "timeout" or late:
        return ApiError(504, str(error), kind="timeout_error", code="request_timeout", headers=NO_RETRY)
    if error.kind == "not_finite":
        return ApiError(500, str(error), code="adapter_not_finite", headers=NO_RETRY)
    if error.kind == "adapter":
        _log.error("%s", error)  # whose text names folders of this machine
        return ApiError(
            500, "the adapter cannot be loaded; the server's log says why", code="adapter_unusable", headers=NO_RETRY
        )
    if error.kind == "stopped" or not accepted:
        return ApiError(503, str(error), code="unavailable")
    return ApiError(500, str(error), code=error.kind)


def add_handlers(app: FastAPI) -> None:
    """Let `app` answer errors of every sort in this form."""
    app.add_exception_handler(ApiError, _ours)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _unforeseen)


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _of_http(request: Request, error: Exception) -> Response:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message = {404: f"there is no {path!r} here", 405: f"{request.method} is not for {path!r}"}
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message.get(error.status_code, str(error.detail)), headers=headers).response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    # the server writes the traceback into the log; clients learn nothing of our inside
    return ApiError(500, "the server made a mistake, which is in its log").response()
