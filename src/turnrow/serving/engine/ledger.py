"""What clients and the engine's thread share: which requests were accepted, how many wait, how they ended, and the engine's state."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Literal

from turnrow.serving.engine.runs import Job
from turnrow.serving.requests import QueueFull, RequestFailed

__all__ = ["Ledger", "State"]

State = Literal["starting", "running", "draining", "stopped", "broken"]

_SLOWEST_S = 60.0
"""A longer time between two answers was for want of requests."""


class Ledger:
    """Thread-safe. What is accepted here leaves by `forget`, once, whatever becomes of it."""

    def __init__(self, max_queue: int) -> None:
        self.wake = threading.Event()
        """Set when there is something for the engine's thread to hear of."""
        self.new: deque[Job] = deque()
        self.given_up: deque[Job] = deque()
        self._max_queue = max_queue
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._state: State = "starting"
        self._error: BaseException | None = None
        self._jobs: set[Job] = set()
        self._waiting = 0
        self._finished: Counter[str] = Counter()
        self._seconds_per_answer = 1.0
        self._last_end = time.monotonic()

    # --- the state of the engine -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Of the engine."""
        return self._state

    @property
    def serves(self) -> bool:
        """Whether what was accepted still runs."""
        return self._state in ("running", "draining")

    def change(self, new: State, *, of: tuple[State, ...], error: BaseException | None = None) -> bool:
        """Change the state if it is one of `of`; whether it was."""
        with self._lock:
            if self._state not in of:
                return False
            self._state, self._error = new, error
            self.wake.set()
            return True

    def closed(self) -> RequestFailed:
        """The error of requests that the engine does not serve (any more)."""
        if self._state == "broken":
            return RequestFailed("engine", f"the engine broke down: {type(self._error).__name__}: {self._error}")
        return RequestFailed("stopped", f"the engine is {self._state} and takes no requests")

    # --- requests ----------------------------------------------------------------------------------------------------

    def accept(self, job: Job) -> None:
        """Take a request in.

        Raises:
            QueueFull: too many wait.
            RequestFailed: the engine does not run (any more).
        """
        with self._lock:
            if self._state != "running":
                raise self.closed()
            if self._waiting + job.request.n > self._max_queue:
                raise QueueFull(self._waiting, max(1.0, self._waiting * self._seconds_per_answer))
            self._waiting += job.request.n
            self._jobs.add(job)
            self.new.append(job)
        self.wake.set()

    def give_up(self, job: Job) -> None:
        """Its client cancels a request."""
        job.handle.fail(RequestFailed("cancelled", f"request {job.handle.request_id} was cancelled"))
        self.given_up.append(job)
        self.wake.set()

    def stop_waiting(self, answers: int) -> None:
        """So many answers have begun to run, or never will."""
        with self._lock:
            self._waiting -= answers

    def forget(self, job: Job) -> None:
        """It has ended."""
        with self._lock:
            self._jobs.discard(job)
            self._changed.notify_all()

    def jobs(self) -> list[Job]:
        """Those accepted that have not ended."""
        with self._lock:
            return list(self._jobs)

    def wait_until_empty(self, timeout: float | None) -> bool:
        """Wait until all have ended; whether they have."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._jobs, timeout)

    # --- figures -----------------------------------------------------------------------------------------------------

    def count(self, how: str) -> None:
        """Count the end of an answer."""
        now = time.monotonic()
        with self._lock:
            self._finished[how] += 1
            # a moving average, of which one answer is a tenth
            self._seconds_per_answer += 0.1 * (min(now - self._last_end, _SLOWEST_S) - self._seconds_per_answer)
            self._last_end = now

    def figures(self) -> tuple[State, int, dict[str, int]]:
        """The state, how many answers wait, and how many ended in which way."""
        with self._lock:
            return self._state, self._waiting, dict(self._finished)
