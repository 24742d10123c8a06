"""`turnrow serve` as a child process, its resident memory over time, and its figures."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

__all__ = ["Child", "figures_of"]

_START_S = 300.0
_END_S = 60.0
_EVERY_S = 0.1
"""Between two looks at the memory."""


class Child:
    """A server on a free port of this machine, from its start to a drain.

    Args:
        arguments: of `turnrow serve`.
        log: a file for what it writes.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._arguments, self._log = arguments, log
        self.memory: list[tuple[float, int]] = []
        """(s since the start, resident bytes)."""
        self._over = threading.Event()

    def __enter__(self) -> Child:
        command = [sys.executable, "-W", "ignore", "-m", "turnrow", "serve", "--port", "0", *self._arguments]
        self.began = time.monotonic()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        try:
            self.url = self._wait_for_url()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._watcher.join()
        self.status = self._process.poll()
        if self.status is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self.status = self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text()

    def seconds(self) -> float:
        """s since its start."""
        return time.monotonic() - self.began

    def _wait_for_url(self) -> str:
        while self.seconds() < _START_S:
            found = re.search(r"serving .* at (http://\S+)/v1", self.log)
            if found:
                return found[1]
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log[-2000:]}")
            time.sleep(0.05)
        raise RuntimeError(f"the server did not start within {_START_S:g} s:\n{self.log[-2000:]}")

    def _watch(self) -> None:
        process = psutil.Process(self._process.pid)
        with suppress(psutil.Error):  # it has ended
            while not self._over.wait(_EVERY_S):
                self.memory.append((self.seconds(), process.memory_info().rss))


def figures_of(url: str) -> dict[str, float]:
    """The server's figures of `/metrics`, by name with labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
