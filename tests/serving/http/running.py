"""A server in a thread, and ways to hold its model back."""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.serving.holding import eventually
from tests.serving.serving_models import model_of
from turnrow.serving import AdapterStore, Engine, Limits
from turnrow.serving.http import Server, ServerSettings, bind, create_app

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a chat begins with the user') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
)


class Running:
    """A server of the tiny Llama on a free port of this machine."""

    def __init__(
        self,
        tokenizer: Any,
        adapters: Mapping[str, Path] | None = None,
        *,
        root: Path | None = None,
        template: str | None = TEMPLATE,
        settings: Mapping[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        model = model_of("llama")
        store = AdapterStore(model, root)
        for name, folder in (adapters or {}).items():
            store.add(name, folder)
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.chat_template = template
        limits.setdefault("batch_tokens", 64)
        self.engine = Engine(model, self.tokenizer, store, Limits(**limits)).start()
        self.app = create_app(self.engine, ServerSettings(**{"base_name": "org/tiny-llama", **(settings or {})}))
        self.server = Server(self.app, self.engine)
        listening = bind("127.0.0.1", 0)
        self.port: int = listening.getsockname()[1]
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        eventually(lambda: self.server.started)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, kind: Any, **settings: Any) -> Any:
        """An openai client, `OpenAI` or `AsyncOpenAI`."""
        return kind(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 30, **settings})

    def end(self) -> None:
        """A signal, as it were."""
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(self.server.end)

    def wait(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.engine.stop()
        self.server.should_exit = True
        self.wait()
        self.engine.store.close()

    def asked(self, body: Any, path: str = "/v1/completions", **headers: str) -> socket.socket:
        """A connection over which a request was sent, and nothing read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data)
        return connection


def slow(engine: Engine, seconds: float = 0.02) -> None:
    """Let every step take a while."""
    assert engine._continuous is not None
    forward = engine._continuous.forward

    def wait(*args: Any) -> torch.Tensor:
        time.sleep(seconds)
        return forward(*args)

    engine._continuous.forward = wait  # type: ignore[method-assign]


def run(work: Any) -> Any:
    return asyncio.run(work)
