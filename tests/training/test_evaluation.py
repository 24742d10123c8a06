"""An evaluation is dealt out to processes in the batches of one."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader

from turnrow.training import evaluation
from turnrow.training.evaluation import SharedEvaluation


def share(rows: int, batch_size: int, processes: int) -> list[SharedEvaluation]:
    loader: DataLoader = DataLoader(list(range(rows)), batch_size=1)  # type: ignore[arg-type]
    return [SharedEvaluation(loader, batch_size, processes, process) for process in range(processes)]


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 7), processes=st.integers(1, 5))
def test_gathered_rounds_are_the_rows_in_order(rows: int, batch_size: int, processes: int) -> None:
    shares = share(rows, batch_size, processes)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for batches in zip(*shares, strict=True):
            assert len({len(batch) for batch in batches}) == 1  # or they could not be gathered
            patch.setattr(evaluation, "gather", lambda data, batches=batches: torch.cat(batches))
            seen += shares[0].gather(batches[0]).tolist()
    assert seen == list(range(rows))


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 7), processes=st.integers(1, 5))
def test_every_batch_is_one_of_a_single_process(rows: int, batch_size: int, processes: int) -> None:
    single = [batch.tolist() for batch in DataLoader(list(range(rows)), batch_size=batch_size)]  # type: ignore[arg-type]
    for shared in share(rows, batch_size, processes):
        assert len(shared) <= -(-len(single) // processes) + 1
        assert all(batch.tolist() in single for batch in shared)
