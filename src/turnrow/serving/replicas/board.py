"""What replicas have to know of one another: which adapters were loaded and unloaded over HTTP, and how each of them fares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

__all__ = ["PERIOD_S", "Board", "BoardLike", "Change", "Report"]

PERIOD_S = 2.0
"""How often a replica reports, s."""

_SILENT_S = 5 * PERIOD_S
"""A replica that was not heard of for so long is gone."""


@dataclass(frozen=True)
class Change:
    """How an adapter is to be from now on."""

    name: str
    folder: str | None
    """It is to be served from there, with the files as they are now; None, it is not to be served."""
    number: int = 0
    """Grows from change to change; given by the board."""


@dataclass(frozen=True)
class Report:
    """How a replica fares."""

    replica: str
    state: str
    """Of its engine, see `EngineStats`."""
    running: int
    waiting: int
    adapters: int
    max_length: int
    """The most tokens of a prompt and its answer together."""
    metrics: str
    """In the text format of Prometheus."""
    at: float = 0.0
    """s, of the board's clock; given by the board."""


class BoardLike(Protocol):
    """What a replica asks of the board, which lies in another process."""

    async def since(self, number: int) -> list[Change]:
        """See `Board.since`."""
        ...

    async def restore(self, changes: Sequence[Change]) -> None:
        """See `Board.restore`."""
        ...

    async def report(self, report: Report) -> int:
        """See `Board.report`."""
        ...


class Board:
    """Belongs to the gateway. If that dies, the replicas bring its list of changes back with their next reports.

    Numbers of changes are times in ns, so that those of a new board are above those of the former.
    """

    def __init__(self) -> None:
        self._changes: dict[str, Change] = {}
        self._reports: dict[str, Report] = {}
        self.number = 0
        """Of the last change; 0 before the first. Every request asks for it."""

    def record(self, change: Change) -> None:
        """Add a change."""
        self.number = max(self.number + 1, time.time_ns())
        self._changes[change.name] = replace(change, number=self.number)

    def since(self, number: int) -> list[Change]:
        """The changes after that of the number, the last one of each adapter, in their order."""
        later = (change for change in self._changes.values() if change.number > number)
        return sorted(later, key=lambda change: change.number)

    def restore(self, changes: Sequence[Change]) -> None:
        """Take over what a replica knows of changes."""
        for change in changes:
            known = self._changes.get(change.name)
            if known is None or known.number < change.number:
                self._changes[change.name] = change
                self.number = max(self.number, change.number)

    def report(self, report: Report) -> int:
        """Hear how a replica fares; the number of the last change."""
        self._reports[report.replica] = replace(report, at=time.monotonic())
        return self.number

    def reports(self) -> list[Report]:
        """The last one of each replica that was heard of lately."""
        since = time.monotonic() - _SILENT_S
        self._reports = {name: report for name, report in self._reports.items() if report.at >= since}
        return [self._reports[name] for name in sorted(self._reports)]
