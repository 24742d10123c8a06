"""One of several equal servers: an engine with its HTTP side, to which calls are put that another process has read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message

from turnrow.errors import UserError
from turnrow.serving.http import ServerSettings, create_app
from turnrow.serving.http.errors import ApiError
from turnrow.serving.http.service import Service
from turnrow.serving.replicas.board import BoardLike, Change, Report
from turnrow.serving.replicas.calls import Call, ask
from turnrow.serving.starting import EngineConfig
from turnrow.serving.store.reading import stamp_of

__all__ = ["Replica"]

_BOARD_S = 1.0
"""So long the board may take to hear a report."""

_log = logging.getLogger(__name__)


class Replica:
    """Loads the model and answers.

    Args:
        name: its own, for reports.
        config: of the engine.
        settings: of the HTTP side.
        board: asked for changes of the adapters.

    Raises:
        UserError: see `EngineConfig.load`.
    """

    def __init__(self, name: str, config: EngineConfig, settings: ServerSettings, board: BoardLike) -> None:
        self.name, self._board = name, board
        self.engine = config.load()
        self._app = create_app(self.engine, settings)
        self._changes: dict[str, Change] = {}
        self._number = 0
        """Of the last change that was made here."""
        self._lacking: dict[str, str] = {}
        """Adapters that should be served and cannot be, and why."""
        self._catching_up = asyncio.Lock()
        self.engine.start()

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """The answer to a call as ASGI messages, with the adapters as they have to be by then."""
        await self._catch_up(call.changes)
        model = call.model
        app: ASGIApp = self._app
        if model in self._lacking:
            app = ApiError(
                503, "this server could not load the adapter; its log says why", code="adapter_unusable"
            ).response()
        elif model is not None and model in self.engine.store:
            await self.hold(model)
        async with contextlib.aclosing(ask(app, call)) as messages:
            async for message in messages:
                yield message

    async def hold(self, adapter: str) -> str:
        """Take note that `adapter` was asked for here, so that it will be asked for here again; for those who can see to that."""
        return adapter

    async def check_health(self) -> None:
        """Report to the board, and hear from it of changes; called every `PERIOD_S`.

        Raises:
            RuntimeError: the engine broke down: this replica is to be replaced.
        """
        with contextlib.suppress(Exception):  # the board may be gone, and comes back
            newest = await asyncio.wait_for(self._board.report(self._report()), _BOARD_S)
            if newest < self._number:
                await self._board.restore(list(self._changes.values()))
            await self._catch_up(newest)
        if (state := self.engine.stats().state) in ("broken", "stopped"):
            raise RuntimeError(f"the engine is {state}")

    def close(self) -> None:
        """Stop the engine."""
        self.engine.stop()
        self.engine.store.close()

    def _report(self) -> Report:
        stats = self.engine.stats()
        service: Service = self._app.state.service
        return Report(
            self.name,
            stats.state,
            stats.running,
            stats.waiting,
            stats.store["registered"],
            self.engine.max_length,
            service.metrics.text().decode(),
        )

    async def _catch_up(self, number: int) -> None:
        if number <= self._number:
            return
        async with self._catching_up:
            for change in await self._board.since(self._number):
                await run_in_threadpool(self._make, change)
                self._changes[change.name], self._number = change, change.number

    def _make(self, change: Change) -> None:
        """Make a change, unless the adapter is as it has to be."""
        store, name = self.engine.store, change.name
        self._lacking.pop(name, None)
        version = store.get(name).version if name in store else None
        try:
            if version is not None and str(version.folder) != change.folder:
                store.remove(name)
                version = None
            if change.folder is None:
                return
            if version is None:
                store.add(name, change.folder)
            elif stamp_of(version.folder) != version.stamp:
                store.reload(name)
        except (UserError, OSError) as error:
            _log.error("the adapter %s, loaded elsewhere, cannot be loaded by replica %s: %s", name, self.name, error)
            if version is None:  # else the one of before stays
                self._lacking[name] = str(error)
