"""An evaluation shared by several processes, with the numbers of one process to the last bit.

accelerate fills up the last batches with rows from the beginning, so that every process has as many. The last rows then stand
in other company, are padded to another length, and their outputs differ in the last bits. Here the batches are those of one
process; they are dealt out in rounds, and a process for which a round has no batch computes another one's again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.utils import gather, recursively_apply
from torch.utils.data import DataLoader

__all__ = ["SharedEvaluation"]


class SharedEvaluation(DataLoader):
    """One process' batches of an evaluation.

    Args:
        loader: of the rows, in whatever batches.
        batch_size: rows in a batch.
        processes: how many share the work.
        process: which of them this is, from 0.
    """

    def __init__(self, loader: DataLoader, batch_size: int, processes: int, process: int) -> None:
        rounds = _rounds(len(loader.dataset), batch_size, processes)  # type: ignore[arg-type]
        self._rows = [sum(map(len, batches)) for batches in rounds]
        self._round = 0
        super().__init__(
            loader.dataset,
            batch_sampler=[list(batches[min(process, len(batches) - 1)]) for batches in rounds],
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for self._round, batch in enumerate(super().__iter__()):
            yield batch

    def gather(self, data: Any) -> Any:
        """All processes' tensors of the current round, in the order of the rows, without what was computed twice."""
        rows = self._rows[self._round]
        return recursively_apply(lambda tensor: tensor[:rows], gather(data))


def _rounds(rows: int, batch_size: int, processes: int) -> list[list[range]]:
    """Batches of one process in groups of `processes` or fewer; within a group all are of one size, to be gathered."""
    whole = rows - rows % batch_size
    batches = [range(start, start + batch_size) for start in range(0, whole, batch_size)]
    rounds = [batches[start : start + processes] for start in range(0, len(batches), processes)]
    return rounds + ([[range(whole, rows)]] if whole < rows else [])
