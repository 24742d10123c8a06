"""Two replicas behind a gateway, all in this process: as one server, and what happens when one of them is lost."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from turnrow.serving.http.errors import ApiError
from turnrow.serving.http.settings import ServerSettings
from turnrow.serving.replicas import Call, Gateway, Replica

SETTINGS = ServerSettings(base_name="tiny", max_body_bytes=10_000)
ASKED = {"model": "mine", "prompt": "abc", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


class Alternating:
    """Puts calls to replicas by turns, and keeps what it was asked."""

    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.asked: list[tuple[Call, str | None]] = []

    def __call__(self, call: Call, adapter: str | None) -> AsyncGenerator[Message, None]:
        self.asked.append((call, adapter))
        return self.replicas[len(self.asked) % len(self.replicas)].answer(call)


def client(gateway: Gateway) -> httpx.AsyncClient:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await gateway(Request(scope, receive))
        await response(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def plain(answer: httpx.Response) -> Any:
    """Status and body, without what differs from answer to answer."""
    text = answer.text
    if answer.headers["content-type"].startswith("application/json"):
        body = answer.json()
        return answer.status_code, {name: body[name] for name in body if name not in ("id", "created")}
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return answer.status_code, [event["choices"] for event in events], text.rstrip().endswith("data: [DONE]")


@pytest.fixture
def adapters_folder(adapters: Any, tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    shutil.copytree(adapters("llama")["rows"], root / "mine")
    return root


@pytest.fixture
def two(replica: Callable[..., Replica], adapters_folder: Path) -> tuple[Gateway, Alternating]:
    ask = Alternating()
    gateway = Gateway(ask, SETTINGS, 2)
    ask.replicas = [replica(name, gateway, adapters_folder) for name in ("one", "two")]
    return gateway, ask


REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/completions", ASKED),
    ("POST", "/v1/completions", {**ASKED, "stream": True}),
    ("POST", "/v1/completions", {**ASKED, "model": "base", "logprobs": 2}),
    ("POST", "/v1/completions", {**ASKED, "model": "no such"}),
    ("POST", "/v1/completions", {**ASKED, "temperature": -1}),
    ("POST", "/v1/completions", ["no object"]),
    ("GET", "/v1/models/mine", None),
    ("GET", "/v1/adapters", None),
    ("GET", "/nowhere", None),
]


def test_answers_are_those_of_one_server(two: tuple[Gateway, Alternating]) -> None:
    gateway, ask = two

    async def compare() -> None:
        direct = httpx.AsyncClient(transport=httpx.ASGITransport(ask.replicas[0]._app), base_url="http://direct")
        async with direct, client(gateway) as through:
            for method, path, body in REQUESTS:
                kind = {"content-type": "application/json"}
                content = None if body is None else json.dumps(body)
                answers = [await who.request(method, path, content=content, headers=kind) for who in (through, direct)]
                assert plain(answers[0]) == plain(answers[1]), path

    asyncio.run(compare())


def test_every_replica_follows_a_change_before_its_next_answer(
    two: tuple[Gateway, Alternating], adapters_folder: Path, adapters: Any
) -> None:
    gateway, ask = two

    async def change() -> None:
        async with client(gateway) as through:
            shutil.copytree(adapters("llama")["road1"], adapters_folder / "new")
            loaded = await through.post("/v1/adapters", json={"name": "new"})
            assert loaded.status_code == 201
            texts = {await text(through, "new") for _ in range(2)}
            assert len(texts) == 1
            shutil.copytree(adapters("llama")["columns"], adapters_folder / "new", dirs_exist_ok=True)
            reloaded = await through.post("/v1/adapters/new/reload")
            assert reloaded.json()["version"] == 2
            others = {await text(through, "new") for _ in range(2)}
            assert len(others) == 1
            assert others != texts
            await through.delete("/v1/adapters/new")
            statuses = {
                (await through.post("/v1/completions", json={**ASKED, "model": "new"})).status_code for _ in range(2)
            }
            assert statuses == {404}
            assert {len(replica.engine.store.names()) for replica in ask.replicas} == {1}

    async def text(through: httpx.AsyncClient, model: str) -> str:
        answer = await through.post("/v1/completions", json={**ASKED, "model": model, "max_tokens": 12})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    asyncio.run(change())


def test_a_change_that_is_refused_changes_nothing(two: tuple[Gateway, Alternating]) -> None:
    gateway, _ = two

    async def change() -> None:
        async with client(gateway) as through:
            refused = await through.post("/v1/adapters", json={"name": "new", "path": "nowhere"})
            assert refused.status_code == 400
        assert gateway.board.number == 0

    asyncio.run(change())


def test_what_cannot_be_loaded_elsewhere_is_an_error_there_and_not_an_unknown_name(
    two: tuple[Gateway, Alternating], adapters_folder: Path
) -> None:
    gateway, _ = two

    async def change() -> None:
        async with client(gateway) as through:
            shutil.copytree(adapters_folder / "mine", adapters_folder / "new")
            assert (await through.post("/v1/adapters", json={"name": "new"})).status_code == 201
            shutil.rmtree(adapters_folder / "new")
            answers = [await through.post("/v1/completions", json={**ASKED, "model": "new"}) for _ in range(2)]
            assert sorted(answer.status_code for answer in answers) == [200, 503]
            failed = next(answer for answer in answers if answer.status_code == 503)
            assert failed.json()["error"]["code"] == "adapter_unusable"

    asyncio.run(change())


def test_replicas_tell_a_new_gateway_what_changed_before(
    two: tuple[Gateway, Alternating], replica: Callable[..., Replica], adapters_folder: Path
) -> None:
    gateway, ask = two

    async def change() -> None:
        async with client(gateway) as through:
            await through.delete("/v1/adapters/mine")
        for one in ask.replicas:
            await one.check_health()
        new = Gateway(ask, SETTINGS, 2)
        for one in ask.replicas:
            one._board.gateway = new  # type: ignore[attr-defined]
        await ask.replicas[0].check_health()
        ask.replicas[1] = replica("three", new, adapters_folder)
        assert ask.replicas[1].engine.store.names() == ["mine"]
        async with client(new) as through:
            answers = [await through.post("/v1/completions", json=ASKED) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [404, 404]

    asyncio.run(change())


def test_only_adapters_that_answered_are_asked_for_by_name_again(two: tuple[Gateway, Alternating]) -> None:
    gateway, ask = two

    async def several() -> None:
        async with client(gateway) as through:
            for model in ("mine", "no such", "no such", "mine"):
                await through.post("/v1/completions", json={**ASKED, "model": model})

    asyncio.run(several())
    assert [adapter for _, adapter in ask.asked] == [None, None, None, "mine"]


def test_health_and_figures_are_of_all_replicas(two: tuple[Gateway, Alternating]) -> None:
    gateway, ask = two

    async def look() -> None:
        async with client(gateway) as through:
            health = await through.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "starting")
            for one in ask.replicas:
                await one.check_health()
            health = await through.get("/health")
            assert (health.status_code, health.json()["status"]) == (200, "running")
            assert [one["id"] for one in health.json()["replicas"]] == ["one", "two"]
            figures = (await through.get("/metrics")).text
            assert 'turnrow_adapters_registered{replica="one"} 1.0' in figures
            assert 'turnrow_adapters_registered{replica="two"} 1.0' in figures
            assert figures.count("# HELP turnrow_adapters_registered ") == 1

    asyncio.run(look())


def test_a_replica_whose_engine_broke_is_not_healthy(two: tuple[Gateway, Alternating]) -> None:
    _, ask = two
    ask.replicas[0].engine.stop()
    with pytest.raises(RuntimeError, match="the engine is stopped"):
        asyncio.run(ask.replicas[0].check_health())


START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
PIECE: Message = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
PLAIN: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
LOST = ApiError(503, "lost", code="replica_lost")


def gateway_of(*messages: Message | Exception | asyncio.Event) -> tuple[Gateway, list[str]]:
    """A gateway whose replica answers so; an event is waited for. And what became of the answer."""
    seen: list[str] = []

    async def ask(call: Call, adapter: str | None) -> AsyncGenerator[Message, None]:
        try:
            for message in messages:
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, asyncio.Event):
                    seen.append("waits")
                    await message.wait()
                else:
                    yield message
            seen.append("whole")
        finally:
            seen.append("closed")

    return Gateway(ask, SETTINGS, 1), seen


def test_a_replica_lost_before_its_answer_is_told_by_the_status() -> None:
    gateway, _ = gateway_of(LOST)

    async def look() -> None:
        async with client(gateway) as through:
            answer = await through.post("/v1/completions", json=ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")

    asyncio.run(look())


def test_a_replica_lost_in_a_stream_is_told_by_its_last_event() -> None:
    gateway, _ = gateway_of(START, PIECE, LOST)

    async def look() -> None:
        async with client(gateway) as through:
            answer = await through.post("/v1/completions", json=ASKED)
        first, last = answer.text.strip().split("\n\n")
        assert first == "data: {}"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"

    asyncio.run(look())


@pytest.mark.parametrize("begun", [[], [PLAIN], [PLAIN, {**PIECE, "body": b"{"}]])
@pytest.mark.parametrize("ends_with", ["an error", "nothing"])
def test_a_replica_lost_within_an_answer_that_is_no_stream_is_told_by_the_status(
    begun: list[Message], ends_with: str
) -> None:
    """Of answers that are ready in one pass of the model, one may have begun while the next one has not."""
    gateway, _ = gateway_of(*begun, *([LOST] if ends_with == "an error" else []))

    async def look() -> None:
        async with client(gateway) as through:
            for path in ("/v1/completions", "/v1/adapters"):
                answer = await through.post(path, json=ASKED)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")

    asyncio.run(look())


def test_a_stream_that_ends_without_its_last_message_was_broken_off() -> None:
    gateway, _ = gateway_of(START, PIECE)

    async def look() -> None:
        async with client(gateway) as through:
            answer = await through.post("/v1/completions", json=ASKED)
        last = answer.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"

    asyncio.run(look())


def test_draining_lets_answers_come_to_their_end_and_takes_no_more() -> None:
    async def look() -> None:
        rest = asyncio.Event()
        gateway, seen = gateway_of(START, PIECE, rest, {"type": "http.response.body", "body": b""})
        async with client(gateway) as through:
            answer = asyncio.ensure_future(through.post("/v1/completions", json=ASKED))
            while not seen:
                await asyncio.sleep(0)
            drained = asyncio.ensure_future(gateway.drain())
            await asyncio.sleep(0)
            refused = await through.post("/v1/completions", json=ASKED)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert (await through.get("/health")).json()["status"] == "draining"
            assert not drained.done()
            rest.set()
            await drained
            assert (await answer).text == "data: {}\n\n"
        assert seen == ["waits", "whole", "closed"]

    asyncio.run(look())


def test_breaking_off_tells_every_client() -> None:
    async def look() -> None:
        gateway, seen = gateway_of(START, PIECE, asyncio.Event())
        async with client(gateway) as through:
            answer = asyncio.ensure_future(through.post("/v1/completions", json=ASKED))
            while not seen:
                await asyncio.sleep(0)
            await gateway.break_off()
            first, last = (await answer).text.strip().split("\n\n")
            assert first == "data: {}"
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert seen == ["waits", "closed"]

    asyncio.run(look())


def test_breaking_off_before_the_answer_is_told_by_the_status() -> None:
    async def look() -> None:
        gateway, _ = gateway_of(asyncio.Event())
        async with client(gateway) as through:
            answer = asyncio.ensure_future(through.post("/v1/completions", json=ASKED))
            while await gateway.open_requests() == 0:
                await asyncio.sleep(0)
            await gateway.break_off()
            assert (await answer).status_code == 503
        assert await gateway.open_requests() == 0

    asyncio.run(look())


def test_a_client_that_goes_frees_the_replica() -> None:
    async def look() -> None:
        gateway, seen = gateway_of(START, PIECE, asyncio.Event())
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"", "client": None
        }  # fmt: skip
        body = [{"type": "http.request", "body": b"{}", "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            while not body and len(sent) < 2:
                await asyncio.sleep(0)
            return body.pop() if body else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        response = await gateway(Request(scope, receive))
        await response(scope, receive, send)
        assert sent == [START, PIECE]
        assert seen == ["waits", "closed"]
        assert await gateway.open_requests() == 0

    asyncio.run(look())


def test_a_body_that_is_too_long_goes_no_further(two: tuple[Gateway, Alternating]) -> None:
    gateway, ask = two

    async def look() -> None:
        async with client(gateway) as through:
            answer = await through.post("/v1/completions", json={**ASKED, "prompt": "x" * 20_000})
        assert answer.status_code == 413
        assert ask.asked == []

    asyncio.run(look())
