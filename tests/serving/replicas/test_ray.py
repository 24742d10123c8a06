"""`turnrow serve --replicas 2`, whole: processes of Ray, one of which is killed under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serve_process import Process
from turnrow.cli.main import main

pytest.importorskip("openai")
pytestmark = pytest.mark.slow

NAMES = ("rows", "road1", "lora")


@pytest.fixture(scope="module")
def served(saved_model: Path, adapters: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    pytest.importorskip("ray.serve", reason="needs the extra [ray]")
    root = tmp_path_factory.mktemp("ray")
    for name in NAMES:
        shutil.copytree(adapters("llama")[name], root / "adapters" / name)
    options = ["--adapters", str(root / "adapters"), "--replicas", "2", "--replica-cpus", "0.5"]
    found = Process(saved_model, root / "log", *options)
    yield found
    found.process.kill()
    found.process.wait()


def replicas(served: Process) -> list[psutil.Process]:
    below = psutil.Process(served.process.pid).children(recursive=True)
    return [process for process in below if "".join(process.cmdline()).startswith("ray::ServeReplica:turnrow:Replica")]


async def load(served: Process, requests: int, kill: psutil.Process | None = None) -> tuple[Counter[str], set[Any]]:
    """Ask for all adapters, whole and streamed by turns. How many came to their end, and how others ended; the distinct answers."""
    from openai import APIError, APIStatusError, AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{served.url()}/v1", api_key="sesame", max_retries=0, timeout=120)
    ended: Counter[str] = Counter()
    texts = set()
    room = asyncio.Semaphore(16)

    async def ask(number: int) -> None:
        model, asked = NAMES[number % 3], {"prompt": "abc", "max_tokens": 60, "temperature": 0}
        async with room:
            try:
                if number % 2:
                    whole: Any = await client.completions.create(model=model, extra_body={"ignore_eos": True}, **asked)
                    text, reason = whole.choices[0].text, whole.choices[0].finish_reason
                else:
                    text, reason = "", None
                    stream: Any = await client.completions.create(
                        model=model, stream=True, extra_body={"ignore_eos": True}, **asked
                    )
                    async for chunk in stream:
                        text, reason = text + chunk.choices[0].text, chunk.choices[0].finish_reason
            except (APIStatusError, APIError) as error:
                ended[error.code or repr(error)] += 1
            else:
                ended[reason or "broke off"] += 1
                texts.add((model, text))
            if kill is not None and sum(ended.values()) == 20:
                kill.kill()

    async with client:
        await asyncio.gather(*(ask(number) for number in range(requests)))
    return ended, texts


def generated(served: Process) -> dict[str, float]:
    """Tokens by replica."""
    figures = served.ask("/metrics").read().decode()
    return {
        name: float(n) for name, n in re.findall(r'turnrow_generated_tokens_total\{replica="(\w+)"\} (\S+)', figures)
    }


def test_an_adapter_is_asked_for_where_it_was_asked_for_before(served: Process) -> None:
    asked = {"model": "rows", "prompt": "abc", "max_tokens": 4, "ignore_eos": True}
    for _ in range(2):  # by the first it becomes known, with the second the replica says so
        served.ask("/v1/completions", asked)
        time.sleep(3)
    before = generated(served)
    assert len(before) == 2
    for _ in range(12):
        served.ask("/v1/completions", asked)
    time.sleep(3)
    more = [count - before[name] for name, count in generated(served).items()]
    assert sorted(more) == [0, 48]


def test_no_request_is_lost_without_an_error_when_a_replica_is_killed(served: Process) -> None:
    assert {entry["id"] for entry in json.load(served.ask("/v1/models"))["data"]} == {"base", *NAMES}
    ended, before = asyncio.run(load(served, 60))
    assert ended == {"length": 60}
    assert len(before) == len(NAMES)  # the same from both replicas

    victims = replicas(served)
    assert len(victims) == 2
    ended, during = asyncio.run(load(served, 120, kill=victims[0]))
    assert set(ended) <= {"length", "replica_lost"}
    assert sum(ended.values()) == 120
    assert ended["length"] > 60
    assert during == before


def test_a_replica_that_died_is_replaced_and_knows_what_was_changed(served: Process) -> None:
    adapters = Path(json.load(served.ask("/v1/adapters"))["data"][0]["path"]).parent
    shutil.copytree(adapters / "rows", adapters / "new")
    served.ask("/v1/adapters", {"name": "new"})
    victim = next(iter(replicas(served)))
    victim.kill()
    victim.wait(30)

    async def ask() -> list[int]:
        import httpx

        headers = {"Authorization": "Bearer sesame"}
        async with httpx.AsyncClient(base_url=served.url(), headers=headers, timeout=120) as client:
            while True:
                health = (await client.get("/health")).json()
                if len(health["replicas"]) >= 2 and len(replicas(served)) == 2:
                    break
                await asyncio.sleep(0.5)
            bodies = [{"model": "new", "prompt": "abc", "max_tokens": 4} for _ in range(16)]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.status_code for answer in answers]

    assert set(asyncio.run(ask())) == {200}


def test_a_gateway_that_died_is_started_again(served: Process) -> None:
    served.url()
    below = psutil.Process(served.process.pid).children(recursive=True)
    victim = next(process for process in below if "".join(process.cmdline()).endswith("turnrow:Gateway"))
    victim.kill()
    victim.wait(30)
    deadline = time.monotonic() + 120
    while True:
        try:
            answer = served.ask("/v1/completions", {"model": "rows", "prompt": "abc", "max_tokens": 4})
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert json.load(answer)["usage"]["completion_tokens"] == 4


def test_keys_are_asked_for(served: Process) -> None:
    import urllib.request

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{served.url()}/v1/models", timeout=30)


def test_a_signal_ends_all_processes_when_all_is_answered(served: Process) -> None:
    asked = {"model": "rows", "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
    stream = served.ask("/v1/completions", asked)
    stream.readline()
    below = psutil.Process(served.process.pid).children(recursive=True)
    os.kill(served.process.pid, signal.SIGTERM)
    assert stream.read().decode().endswith("data: [DONE]\n\n")
    assert served.process.wait(60) == 0
    assert "taking no more requests; 1 are being answered" in served.log.read_text()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2", "--replica-cpus", "100"], "2 replicas of 100 CPU each need more than"),
        (["--replicas", "2", "--replica-gpus", "1"], "2 replicas of 1 GPU each need more than the 0 that there are"),
        (["--replicas", "2", "--adapters", "nowhere"], "the adapters' folder 'nowhere' does not exist"),
        (["--ray-address", "127.0.0.1:9"], "Ray cannot be reached at '127.0.0.1:9'"),
        (
            ["--ray-address", "ray://head"],
            "the address of the Ray cluster is 'ray://head'; it must be HOST:PORT, or auto",
        ),
        (["--replicas", "0"], "replicas is 0"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    saved_model: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray.serve", reason="needs the extra [ray]")
    assert main(["serve", "--model", str(saved_model), "--port", "0", *options]) == 2
    assert message in capfd.readouterr().err
