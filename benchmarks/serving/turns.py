"""Methods that take turns, one forward pass each: what the machine does beside, it does to all of them alike.

A machine's speed drifts by a tenth and more within seconds, which is how long a batch takes, and hides differences of a few hundredths.
A pass takes milliseconds.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from benchmarks.serving.served import Served, always_open

__all__ = ["CLOCKS", "take_turns"]

CLOCKS = ("thread_time", "perf_counter")
"""Processor time of the thread that runs the model, where one thread of a CPU does all of it; else the time of day."""


def take_turns(
    batches: Mapping[Any, tuple[Served, Sequence[int | None]]], order: Sequence[Any], *, clock: str, device: str
) -> dict[Any, float]:
    """Let all answer a batch, pass by pass in turn.

    From the first pass on all that a method does counts: its passes, the choice of tokens, the making of the next step.

    Args:
        batches: those who answer, each with a model, and a thread that runs it, of its own; and the adapters of its requests.
        order: the names, in which order they take turns.
        clock: one of `CLOCKS`.
        device: of the models.

    Returns:
        The seconds of each.
    """
    turns = _Turns(order, clock, device)
    gc.collect()
    gc.disable()
    try:
        with ThreadPoolExecutor(len(order)) as threads:
            for name in order:
                served, adapters = batches[name]
                served.gate = partial(turns.wait, name)  # before its first pass, which comes with the batch
                served.begin(adapters)
            ends = [threads.submit(turns.until_end, name, batches[name][0].answer) for name in order]
            for end in ends:
                end.result()
    finally:
        gc.enable()
        for name in order:
            batches[name][0].gate = always_open
    return turns.seconds


class _Turns:
    def __init__(self, order: Sequence[Any], clock: str, device: str) -> None:
        self.seconds = dict.fromkeys(order, 0.0)
        self._order, self._clock = list(order), clock
        self._cuda = torch.device(device).type == "cuda"
        self._threads: dict[Any, int] = {}
        """The clocks of the threads that run the models."""
        self._turn: Any = None
        self._since = 0.0
        self._changed = threading.Condition()

    def wait(self, name: Any) -> None:
        """The thread of `name` is about to run its model: let the others, and come back when it is its turn."""
        with self._changed:
            if self._turn == name:
                self._pass_on(name)
            else:
                self._threads[name] = time.pthread_getcpuclockid(threading.get_ident())
                if len(self._threads) == len(self._order):  # nobody begins before all are ready
                    self._turn = self._order[0]
                    self._changed.notify_all()
            self._changed.wait_for(lambda: self._turn == name)
            self._since = self._now(name)

    def until_end(self, name: Any, answer: Callable[[], object]) -> None:
        """Answer, and take no more turns."""
        answer()
        with self._changed:
            self._pass_on(name)
            self._order.remove(name)
            self._changed.notify_all()

    def _pass_on(self, name: Any) -> None:
        self.seconds[name] += self._now(name) - self._since
        place = self._order.index(name)
        self._turn = self._order[(place + 1) % len(self._order)]
        self._changed.notify_all()

    def _now(self, name: Any) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        if self._clock == "thread_time":
            return time.clock_gettime(self._threads[name])
        return time.perf_counter()
