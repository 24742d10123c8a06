"""The batches of samples, and the kernels that products of their gradients are added to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Gram", "Samples"]


@dataclass(frozen=True)
class Samples:
    """The batches in order, those of the training samples first."""

    sizes: tuple[int, ...]
    """Samples in each batch."""
    train_batches: int
    classes: int

    def start(self, batch: int) -> int:
        """The number of the first sample of a batch among the training samples, or among the others."""
        first = 0 if batch < self.train_batches else self.train_batches
        return sum(self.sizes[first:batch])

    @property
    def train(self) -> int:
        """Number of training samples."""
        return sum(self.sizes[: self.train_batches])

    @property
    def others(self) -> int:
        """Number of other samples."""
        return sum(self.sizes[self.train_batches :])

    def tiles(self, most: int, *, train: bool) -> list[range]:
        """Neighbouring batches of at most so many samples together, one batch at least."""
        first, last = (0, self.train_batches) if train else (self.train_batches, len(self.sizes))
        tiles: list[range] = []
        begin, held = first, 0
        for batch in range(first, last):
            if held and held + self.sizes[batch] > most:
                tiles.append(range(begin, batch))
                begin, held = batch, 0
            held += self.sizes[batch]
        return [*tiles, range(begin, last)] if last > first else []


class Gram:
    """The kernel of one method as it grows: float64, samples times outputs along each side, output fastest.

    Of the symmetric matrix of the training samples only what is on and above its diagonal blocks is filled.
    """

    def __init__(self, samples: Samples) -> None:
        n, m, c = samples.train, samples.others, samples.classes
        self.samples = samples
        self.train = np.zeros((n * c, n * c))
        self.others = np.zeros((m * c, n * c))

    def add(
        self, first: int, second: int, values: Tensor, shift: int = 0, shift_columns: int = 0, sign: int = 1
    ) -> None:
        """Add products of the outputs of neighbouring batches.

        Args:
            first: the batch, a training one, that the rows begin with.
            second: the batch that the columns begin with, not before it.
            values: (rows, columns).
            shift: rows that were left out at the beginning.
            shift_columns: likewise columns.
            sign: -1 takes away.
        """
        c = self.samples.classes
        row, column = self.samples.start(first) * c + shift, self.samples.start(second) * c + shift_columns
        block = values.to("cpu", torch.float64).numpy()
        add = np.add if sign > 0 else np.subtract
        if second < self.samples.train_batches:
            part = self.train[row : row + block.shape[0], column : column + block.shape[1]]
            add(part, block, out=part)
        else:
            part = self.others[column : column + block.shape[1], row : row + block.shape[0]]
            add(part, block.T, out=part)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, n, C, C) and (m, n, C, C)."""
        n, m, c = self.samples.train, self.samples.others, self.samples.classes
        whole = np.triu(self.train)
        whole += np.triu(self.train, 1).T
        train = whole.reshape(n, c, n, c).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(train), np.ascontiguousarray(self.others.reshape(m, c, n, c).transpose(0, 2, 1, 3))
