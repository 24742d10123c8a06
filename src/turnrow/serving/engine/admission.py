"""Which waiting answers may begin to run: in their order, as far as their adapters have a slot or can get one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from turnrow.errors import AdapterError
from turnrow.serving.batch.adapter_layers import AdapterLayers
from turnrow.serving.batch.slots import SlotTable
from turnrow.serving.engine.runs import Job, Run
from turnrow.serving.requests import RequestFailed
from turnrow.serving.store.adapters import AdapterStore, Version

__all__ = ["Admission"]


class Admission:
    """The queue, and the slots of the adapters that run. Belongs to the engine's thread.

    An answer whose adapter is read from disk is passed over until it is there. One that finds all slots in use is passed over by
    at most `max_overtaken` others; then nobody goes before it. The version of an adapter is settled when the first answer of a
    request begins, and its slot kept until the last has ended.
    """

    def __init__(self, store: AdapterStore, layers: AdapterLayers, slots: int, max_overtaken: int) -> None:
        self._store, self._layers, self._max_overtaken = store, layers, max_overtaken
        self.slots: SlotTable[Version] = SlotTable(slots)
        self.queue: deque[Run] = deque()
        self.uploads = 0
        """How often an adapter was put into a slot."""
        self._asked = 0
        """For how many adapters the store was sent in this round."""

    def admit(self, room: int, fail: Callable[[Run, RequestFailed], None]) -> list[Run]:
        """Take up to `room` answers out of the queue, their slots filled and pinned.

        Args:
            fail: called for an answer whose adapter cannot be loaded; it must take it out of the queue.
        """
        admitted: list[Run] = []
        blocked: list[Run] = []
        self._asked = 0
        for run in list(self.queue):
            if len(admitted) >= room:
                break
            if run.job.ended:  # another answer of its request has failed just now
                continue
            try:
                state = self._settle(run)
            except AdapterError as error:
                fail(run, RequestFailed("adapter", str(error)))
                continue
            if state == "ready":
                admitted.append(run)
                self.queue.remove(run)
                for other in blocked:
                    other.overtaken += 1
            elif state == "blocked":
                blocked.append(run)
            if any(other.overtaken >= self._max_overtaken for other in blocked):
                break
        return admitted

    def release(self, job: Job) -> None:
        """End a request's use of its slot."""
        version, job.slot = job.version, None
        if version is None or job.entry is None:
            return
        self.slots.unpin(version)
        stale = job.entry.removed or job.entry.version is not version
        if stale and not self.slots.is_pinned(version):
            self._layers.drop(self.slots.free(version))

    def leave(self, run: Run) -> None:
        """Take an answer out of the queue that is not to run."""
        self.queue.remove(run)
        if run.job.entry is not None:
            self._store.no_longer_wanted(run.job.entry.version)

    def _settle(self, run: Run) -> Literal["ready", "loading", "blocked"]:
        job = run.job
        if job.entry is None or job.slot is not None:
            return "ready"
        version = job.entry.version
        slot = self.slots.find(version)
        if slot is None:
            if not self.slots.can_take():
                return "blocked"
            if self._asked >= self.slots.count - self.slots.pinned:
                return "loading"  # there would be no slot for it
            parts = self._store.weights(version)
            if parts is None:
                self._asked += 1
                return "loading"
            slot, _ = self.slots.take(version)
            self._layers.put(slot, parts)
            self.uploads += 1
        self.slots.pin(version)
        job.version, job.slot = version, slot
        job.handle.adapter_version = version.number
        return "ready"
