"""Replicas in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def replica(saved_model: Path) -> Iterator[Callable[..., Any]]:
    """`replica(name, board, adapters=folder, limits=...)`."""
    from turnrow.serving import EngineConfig, Limits
    from turnrow.serving.http import ServerSettings
    from turnrow.serving.replicas import Board, Change, Replica, Report

    class Near:
        """A board in the same process."""

        def __init__(self, gateway: Any) -> None:
            self.gateway = gateway

        @property
        def board(self) -> Board:
            return self.gateway.board

        async def since(self, number: int) -> list[Change]:
            return self.board.since(number)

        async def restore(self, changes: Sequence[Change]) -> None:
            self.board.restore(changes)

        async def report(self, report: Report) -> int:
            return self.board.report(report)

    made = []

    def make(name: str, gateway: Any, adapters: Path, **settings: Any) -> Replica:
        config = EngineConfig(str(saved_model), str(adapters), limits=Limits(batch_tokens=64))
        made.append(
            Replica(
                name,
                config,
                ServerSettings(**{"base_name": "tiny", "manage_adapters": True, **settings}),
                Near(gateway),
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()
