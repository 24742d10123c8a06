"""Hold an engine back, and wait until something is so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from turnrow.serving import Engine

__all__ = ["Gate", "eventually"]


class Gate:
    """Holds an engine's steps back until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self._open = threading.Event()
        self.waits = threading.Event()
        assert engine._continuous is not None
        forward = engine._continuous.forward

        def wait(*args: Any) -> torch.Tensor:
            self.waits.set()
            assert self._open.wait(20)
            return forward(*args)

        engine._continuous.forward = wait  # type: ignore[method-assign]

    def open(self) -> None:
        self._open.set()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
