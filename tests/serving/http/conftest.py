"""Servers of the tests: one for all that only ask, and others to be broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.serving_models import configurations, write_adapter

if TYPE_CHECKING:
    from tests.serving.http.running import Running

NAMES = ("rows", "road1", "lora")


@pytest.fixture(scope="session")
def folders(adapters: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters by name, and one with values, finite ones, that make the model compute NaN."""
    found = {name: adapters("llama")[name] for name in NAMES}
    poison = tmp_path_factory.mktemp("poison") / "p"
    found["poison"] = write_adapter("llama", configurations("llama")["rows"], poison, seed=1, size=1e37)
    return found


@pytest.fixture(scope="session")
def shared(folders: dict[str, Path], byte_tokenizer: Any) -> Iterator[Running]:
    """A server that no test changes."""
    from tests.serving.http.running import Running

    running = Running(byte_tokenizer, folders)
    yield running
    running.close()


@pytest.fixture
def start(byte_tokenizer: Any) -> Iterator[Callable[..., Running]]:
    """`start(adapters, settings={...}, max_running=2)`: a server of the test's own."""
    from tests.serving.http.running import Running

    servers: list[Running] = []

    def start(*args: Any, **settings: Any) -> Running:
        servers.append(Running(byte_tokenizer, *args, **settings))
        return servers[-1]

    yield start
    for running in servers:
        running.close()
