"""Tensors with a place for every slot."""

from __future__ import annotations

import torch

from turnrow.serving.batch.tables import Table

CPU = torch.device("cpu")


def test_a_table_grows_and_keeps_what_it_holds():
    table = Table(CPU, ranked=True)
    table.put(0, torch.full((2, 3), 1.0))
    assert table.values is not None
    assert table.values.shape == (1, 2, 3)
    table.put(2, torch.full((3, 3), 2.0))
    assert table.values.shape == (4, 4, 3)
    assert table.values[0].tolist() == [[1] * 3, [1] * 3, [0] * 3, [0] * 3]
    table.put(2, torch.full((1, 3), 5.0))
    assert table.values[2].tolist() == [[5] * 3, [0] * 3, [0] * 3, [0] * 3]
    assert table.nbytes == 4 * 4 * 3 * 4
