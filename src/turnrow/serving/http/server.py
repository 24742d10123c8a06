"""Run the application until a signal: the first lets what was accepted come to its end, the second ends at once."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from turnrow.errors import UserError
from turnrow.serving.engine import Engine
from turnrow.serving.http.app import create_app
from turnrow.serving.http.settings import ServerSettings

__all__ = ["Server", "bind", "run_server"]

_log = logging.getLogger(__name__)

_SLOW_READER_S = 10
"""So long a client may take, when all is done, to read the rest of its answer."""
_LAST_WORDS_S = 2.0
"""So long the engine may take to end at once."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else can have; it does not listen yet.

    Args:
        host: a name or address of this machine.
        port: 0 for any that is free.

    Raises:
        UserError: it cannot be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"the port is {port}; it must be a number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"the server cannot listen at {host!r}: {error}") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise UserError(
            f"the server cannot listen at {host} port {port}: {error}; is another one running there?"
        ) from None
    return found


class Server(uvicorn.Server):
    """Drains at the first signal, and goes on answering meanwhile: ``/health`` says so, new requests get 503.

    Args:
        app: of `create_app`.
        engine: the one it serves.
        on_ready: called once it listens.
    """

    def __init__(self, app: FastAPI, engine: Engine, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_SLOW_READER_S,
            )
        )
        self._engine, self._on_ready = engine, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.forced = False
        """It was ended by a second signal."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. It comes in the middle of anything, so that all is left to the loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Drain; called again, end at once. To be called in the server's loop."""
        self._signals += 1
        if self._signals > 2:
            self.should_exit = self.force_exit = True
            return
        task = asyncio.ensure_future(self._drain() if self._signals == 1 else self._break_off())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        stats = self._engine.stats()
        _log.info(
            "taking no more requests; %d answers run and %d wait. Once more, and they are given up",
            stats.running,
            stats.waiting,
        )
        await _in_thread(self._engine.drain)
        self.should_exit = True

    async def _break_off(self) -> None:
        _log.info("giving up what still runs")
        self.forced = True
        try:
            await asyncio.wait_for(_in_thread(self._engine.stop), _LAST_WORDS_S)
            await asyncio.sleep(0.1)  # for the errors to go out
        except asyncio.TimeoutError:
            _log.warning("the model does not come to the end of its step")
        self.should_exit = self.force_exit = True


async def _in_thread(what: Callable[[], object]) -> None:
    """Do it in a thread for which nobody waits at the end of the process."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def work() -> None:
        what()
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=work, daemon=True, name="turnrow-ending").start()
    await done.wait()


def run_server(
    engine: Engine,
    settings: ServerSettings,
    listening: socket.socket,
    on_ready: Callable[[], None] = lambda: None,
) -> bool:
    """Serve a started engine in the main thread until SIGINT or SIGTERM.

    Args:
        engine: left drained, or stopped after a second signal.
        settings: of the HTTP side.
        listening: of `bind`; closed in the end.
        on_ready: called once it listens.

    Returns:
        Whether all that was accepted came to its end.
    """
    server = Server(create_app(engine, settings), engine, on_ready)
    server.run(sockets=[listening])
    return not server.forced
