"""Full queues, deadlines, clients that go away, poison, drains and break-downs, seen from outside."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="needs the official client")

from tests.serving.holding import Gate, eventually  # noqa: E402 - needs the extra
from tests.serving.http.running import slow  # noqa: E402 - needs the extra

HTTP = httpx.Client(verify=False, timeout=30)
ASKED: dict[str, Any] = {"model": "base", "prompt": "Call me", "max_tokens": 4, "temperature": 0}
LONG = {**ASKED, "max_tokens": 100}


def post(running, body, path="/v1/completions"):
    return HTTP.post(running.url + path, json=body)


def idle(running):
    stats = running.engine.stats()
    return stats.running == stats.waiting == stats.slots_in_use == stats.cache_tokens_held == 0


def figure(running, name, **labels):
    """A figure of /metrics; 0 where there is none yet."""
    given = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    line = re.escape(name + (f"{{{given}}}" if given else "")) + r" (\S+)"
    found = re.search(f"^{line}$", HTTP.get(f"{running.url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_full_queue_says_when_to_come_again_and_loses_nothing(start):
    running = start(max_queue=3)
    gate = Gate(running.engine)
    with ThreadPoolExecutor(8) as pool:
        running_now = [pool.submit(post, running, ASKED)]
        assert gate.waits.wait(20)
        waiting = [pool.submit(post, running, ASKED) for _ in range(3)]
        eventually(lambda: running.engine.stats().waiting == 3)
        for stream in (False, True):
            refused = post(running, {**ASKED, "stream": stream})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.json()["error"]["code"] == "queue_full"
        with (
            running.client(openai.OpenAI) as client,
            pytest.raises(openai.RateLimitError, match="requests wait already"),
        ):
            client.completions.create(**ASKED)
        gate.open()
        texts = {answer.result().json()["choices"][0]["text"] for answer in [*running_now, *waiting]}
    assert len(texts) == 1
    assert figure(running, "turnrow_http_requests_total", route="/v1/completions", model_kind="base", status="429") == 3


def test_of_several_prompts_all_are_taken_or_none(start):
    running = start(max_running=1, max_queue=3)
    gate = Gate(running.engine)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, running, ASKED)
        eventually(lambda: running.engine.stats().running == 1)
        second = pool.submit(post, running, ASKED)
        eventually(lambda: running.engine.stats().waiting == 1)
        assert post(running, {**ASKED, "prompt": ["a", "b", "c"]}).status_code == 429
        gate.open()
        assert first.result().status_code == second.result().status_code == 200
    eventually(lambda: idle(running))
    assert running.engine.stats().finished["length"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_kept_with_an_error_that_is_not_tried_again(start, stream):
    running = start(max_running=1, settings={"request_timeout_s": 0.3})
    slow(running.engine, 0.25)
    before = running.asked(LONG)
    eventually(lambda: running.engine.stats().running == 1)
    with running.client(openai.OpenAI, max_retries=2) as client, pytest.raises(openai.InternalServerError) as failure:
        list(client.completions.create(**LONG, stream=stream))
    assert failure.value.status_code == 504
    assert failure.value.body["code"] == "request_timeout"
    eventually(lambda: idle(running))
    assert running.engine.stats().finished == {"timeout": 2}
    before.close()


def test_an_engine_that_hangs_in_a_step_keeps_nobody_waiting(start, monkeypatch):
    monkeypatch.setattr("turnrow.serving.http.answers._GRACE_S", 0.1)
    running = start(settings={"request_timeout_s": 0.2})
    gate = Gate(running.engine)
    answers = [post(running, {**LONG, "stream": stream}) for stream in (False, True)]
    gate.open()
    for answer in answers:
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "request_timeout"


@pytest.mark.parametrize(
    "asked", [LONG, {**LONG, "stream": True}, {**LONG, "n": 2, "prompt": ["a", "b"], "stream": True}]
)
@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_client_that_goes_away_frees_its_place_at_once(start, asked, when):
    running = start(max_running=4, max_queue=64)
    slow(running.engine)
    others = []
    if when == "waiting":
        others = [running.asked({**LONG, "max_tokens": 120, "n": 4})]
        eventually(lambda: running.engine.stats().running == 4)
    before = running.engine.stats()
    connection = running.asked(asked)
    eventually(
        lambda: running.engine.stats() != before and (running.engine.stats().running or running.engine.stats().waiting)
    )
    if when == "waiting":
        eventually(lambda: running.engine.stats().waiting > 0)
    elif asked.get("stream"):
        while b"data:" not in connection.recv(65536):
            pass
    connection.close()
    for other in others:
        eventually(lambda: running.engine.stats().waiting == 0)
        assert running.engine.stats().running == 4
        other.close()
    eventually(lambda: idle(running))
    finished = running.engine.stats().finished
    assert set(finished) == {"cancelled"}
    eventually(
        lambda: (
            figure(running, "turnrow_http_requests_total", route="/v1/completions", model_kind="base", status="499") > 0
        )
    )


def test_clients_of_the_official_package_that_stop_reading_are_noticed(start):
    running = start()
    slow(running.engine)

    async def ask():
        async with running.client(openai.AsyncOpenAI) as client:
            stream = await client.completions.create(**LONG, stream=True)
            async for _ in stream:
                break
            await stream.close()
            whole = asyncio.ensure_future(client.completions.create(**LONG))
            await asyncio.sleep(0.3)
            whole.cancel()
            with pytest.raises(asyncio.CancelledError):
                await whole

    asyncio.run(ask())
    eventually(lambda: idle(running))
    assert running.engine.stats().finished == {"cancelled": 2}


def test_a_poisoned_adapter_fails_its_own_requests_alone(start, folders):
    running = start(folders, max_running=8)
    healthy = {
        name: post(running, {**LONG, "model": name}).json()["choices"][0]["text"] for name in ("base", "rows", "lora")
    }
    with ThreadPoolExecutor(8) as pool:
        good = {name: pool.submit(post, running, {**LONG, "model": name}) for name in healthy}
        bad = [pool.submit(post, running, {**LONG, "model": "poison", "stream": stream}) for stream in (False, True)]
        for answer in bad:
            assert answer.result().status_code == 500
            assert answer.result().json()["error"]["code"] == "adapter_not_finite"
            assert "adapter 'poison'" in answer.result().json()["error"]["message"]
            assert answer.result().headers["x-should-retry"] == "false"
        assert {name: answer.result().json()["choices"][0]["text"] for name, answer in good.items()} == healthy
    assert HTTP.get(f"{running.url}/health").status_code == 200


def test_an_adapter_whose_files_were_spoilt_fails_without_naming_folders(start, folders, tmp_path, caplog):
    folder = shutil.copytree(folders["rows"], tmp_path / "spoilt")
    running = start()
    running.engine.store.add("spoilt", folder, whole=False)
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    answer = post(running, {**ASKED, "model": "spoilt"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "adapter_unusable")
    assert str(tmp_path) not in answer.text
    assert str(tmp_path) in caplog.text
    assert post(running, ASKED).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_break_down_is_told_to_all_and_health_says_so(start, stream):
    running = start(max_running=2)
    assert running.engine._continuous is not None
    slow(running.engine)
    if stream:
        connection = running.asked({**LONG, "stream": True})
        while b"data:" not in connection.recv(65536):
            pass

    def fail(*args):
        raise MemoryError("no memory for this step")

    running.engine._continuous.forward = fail
    if stream:
        rest = b""
        while part := connection.recv(65536):
            rest += part
            if b'"error"' in rest:
                break
        events = [line for line in rest.decode().splitlines() if line.startswith("data: ")]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine"
        connection.close()
    else:
        answer = post(running, LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine")
    eventually(lambda: HTTP.get(f"{running.url}/health").status_code == 503)
    assert HTTP.get(f"{running.url}/health").json() == {"status": "broken"}
    for body in (ASKED, {**ASKED, "stream": True}, {**ASKED, "prompt": ["a", "b"]}):
        later = post(running, body)
        assert later.status_code == 503
        error = later.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("server_error", "unavailable", None)
        assert "the engine broke down: MemoryError" in error["message"]
    assert figure(running, "turnrow_engine_state", state="broken") == 1


def test_a_stream_that_breaks_off_raises_in_the_client(start):
    running = start(settings={"request_timeout_s": 0.5})
    slow(running.engine, 0.05)
    with running.client(openai.OpenAI) as client, pytest.raises(openai.APIError, match="was not done within 0.5 s"):
        list(client.completions.create(**LONG, stream=True))


def test_the_first_signal_lets_all_end_and_takes_no_more(start):
    running = start(max_running=1)
    gate = Gate(running.engine)
    with ThreadPoolExecutor(3) as pool:
        accepted = [
            pool.submit(post, running, ASKED),
            pool.submit(lambda: HTTP.post(f"{running.url}/v1/completions", json={**ASKED, "stream": True})),
        ]
        eventually(lambda: running.engine.stats().running + running.engine.stats().waiting == 2)
        running.end()
        eventually(lambda: running.engine.stats().state == "draining")
        refused = post(running, ASKED)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        health = HTTP.get(f"{running.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        gate.open()
        whole, stream = (answer.result() for answer in accepted)
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    assert stream.text.endswith("data: [DONE]\n\n")
    running.wait()
    assert not running.server.forced
    with pytest.raises(OSError):  # noqa: PT011 - whichever: nobody listens
        socket.create_connection(("127.0.0.1", running.port), timeout=5).close()


def test_a_second_signal_ends_at_once_with_an_error_for_everybody(start):
    running = start(max_running=1)
    slow(running.engine, 0.05)
    with ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(post, running, LONG) for _ in range(2)]
        eventually(lambda: running.engine.stats().running + running.engine.stats().waiting == 2)
        began = time.monotonic()
        running.end()
        running.end()
        for answer in accepted:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"]["code"] == "unavailable"
        running.wait()
        assert time.monotonic() - began < 4  # the answers would have taken ten
    assert running.server.forced


def test_a_third_signal_does_not_wait_for_a_step_that_hangs(start):
    running = start()
    gate = Gate(running.engine)
    connection = running.asked(LONG)
    assert gate.waits.wait(20)
    for _ in range(3):
        running.end()
    running.wait()
    gate.open()
    connection.close()


def test_figures_count_what_was_done_and_have_no_label_of_an_adapter(start, folders):
    running = start(folders, slots=1)
    for name in ("rows", "lora", "rows", "base"):
        assert post(running, {**ASKED, "model": name}).status_code == 200
    for name in ("nothing", *(f"adapter-{number}" for number in range(5))):
        assert post(running, {**ASKED, "model": name}).status_code == 404
    for path in ("x", "y/z", "v1/models/rows", "v1/models/none"):
        HTTP.get(f"{running.url}/{path}")
    completions = {"route": "/v1/completions"}
    total = "turnrow_http_requests_total"
    assert figure(running, total, **completions, model_kind="adapter", status="200") == 3
    assert figure(running, total, **completions, model_kind="base", status="200") == 1
    assert figure(running, total, **completions, model_kind="none", status="404") == 6
    assert figure(running, total, route="other", model_kind="none", status="404") == 2
    assert figure(running, "turnrow_http_request_seconds_count", **completions) == 10
    assert figure(running, "turnrow_time_to_first_token_seconds_count", model_kind="adapter") == 3
    assert figure(running, "turnrow_prompt_tokens_total") == 4 * len("Call me")
    assert figure(running, "turnrow_generated_tokens_total") == 4 * 4
    assert figure(running, "turnrow_answers_total", how="length") == 4
    assert figure(running, "turnrow_adapter_slots") == 1
    assert figure(running, "turnrow_adapter_uploads_total") == 3
    assert figure(running, "turnrow_adapter_evictions_total") == 2
    assert figure(running, "turnrow_adapters_registered") == len(folders)
    assert figure(running, "turnrow_engine_state", state="running") == 1
    text = HTTP.get(f"{running.url}/metrics").text
    assert not any(f'"{name}"' in text for name in [*folders, "nothing", "adapter-1"])


def test_the_log_says_who_asked_what_and_nothing_of_what_was_said(start, folders, caplog):
    caplog.set_level(logging.INFO, "turnrow.serving.http.access")
    running = start(folders)
    answer = post(running, {**ASKED, "model": "rows", "prompt": "a secret"})
    post(running, {**ASKED, "model": "hidden name"})
    HTTP.get(f"{running.url}/health")
    HTTP.get(f"{running.url}/line%0Abreak")
    eventually(lambda: len(caplog.messages) >= 3)
    first, second, third = caplog.messages
    assert re.fullmatch(
        r"127\.0\.0\.1 POST '/v1/completions' 200 \d\.\d{3} s, model rows, tokens 8 \+ 4, "
        + answer.headers["x-request-id"],
        first,
    )
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"
    assert " 404 " in second
    assert third.startswith("127.0.0.1 GET '/line\\nbreak' 404")
    assert not any(word in caplog.text for word in ("secret", "hidden"))
