"""A request as data, and an application that answers it elsewhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from turnrow.serving.replicas import Call, ask


def call(method: str = "POST", path: str = "/v1/completions", body: bytes = b"{}") -> Call:
    return Call(method, path, path.encode(), b"a=1", ((b"x-y", b"z"),), ("1.2.3.4", 5), body)


async def answer(app: Any, call: Call) -> list[Any]:
    return [message async for message in ask(app, call)]


def test_an_application_sees_the_request_as_it_was() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert (message["body"], message["more_body"]) == (b"{}", False)
        seen = {name: scope[name] for name in ("method", "path", "raw_path", "query_string", "headers", "client")}
        await send({"type": "seen", **seen})

    [seen] = asyncio.run(answer(app, call()))
    assert seen["path"] == "/v1/completions"
    assert seen["raw_path"] == b"/v1/completions"
    assert seen["headers"] == [(b"x-y", b"z")]
    assert seen["query_string"] == b"a=1"
    assert seen["client"] == ("1.2.3.4", 5)


def test_who_reads_no_further_is_a_client_that_went() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "first"})
        seen.append((await receive())["type"])

    async def read_one() -> None:
        messages = ask(app, call())
        assert (await messages.__anext__())["type"] == "first"
        await messages.aclose()

    asyncio.run(read_one())
    assert seen == ["http.disconnect"]


def test_an_application_that_goes_wrong_ends_the_answer_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "first"})
        raise ValueError("no more")

    assert asyncio.run(answer(app, call())) == [{"type": "first"}]
    assert "POST /v1/completions went wrong" in caplog.text


BODIES = [
    (call(body=json.dumps({"model": "mine"}).encode()), "mine"),
    (call(path="/v1/chat/completions", body=b'{"model": "mine"}'), "mine"),
    (call(path="/v1/adapters", body=b'{"model": "mine"}'), None),
    (call("GET", body=b'{"model": "mine"}'), None),
    (call(body=b""), None),
    (call(body=b"\xff"), None),
    (call(body=b"[" * 100_000), None),
    (call(body=b'{"model": 5}'), None),
    (call(body=b'["model"]'), None),
]


@pytest.mark.parametrize(("call", "model"), BODIES)
def test_the_model_is_read_where_there_is_one(call: Call, model: str | None) -> None:
    assert call.model == model


def test_what_changes_adapters_is_told_by_method_and_path() -> None:
    assert call(path="/v1/adapters").changes_adapters
    assert call(path="/v1/adapters/mine/reload").changes_adapters
    assert call("DELETE", "/v1/adapters/mine").changes_adapters
    assert not call("GET", "/v1/adapters").changes_adapters
    assert not call().changes_adapters
