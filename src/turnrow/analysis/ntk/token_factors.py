"""The factors of a weight for a batch: what its modules read and what came back, of linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Load", "Remembered", "TokenFactors"]


@dataclass
class TokenFactors:
    """The factors of a weight for a batch: from linear layers, from embeddings that share it, or both."""

    x: Tensor | None = None
    """(B, T, in)"""
    g: Tensor | None = None
    """(B, C, T, out)"""
    ids: Tensor | None = None
    """(B, S) int64: row of the weight that each token looked up."""
    e: Tensor | None = None
    """(B, C, S, in): gradients of what was looked up."""

    @property
    def tokens(self) -> tuple[int, int]:
        """T and S."""
        return (0 if self.x is None else self.x.shape[1]), (0 if self.ids is None else self.ids.shape[1])

    @property
    def is_empty(self) -> bool:
        """Whether no output of the batch depends on the weight."""
        return self.x is None and self.ids is None


Load = Callable[[int], TokenFactors]
"""The factors of a batch, by its number."""


class Remembered:
    """What `load` returned last time, as long as it takes no more than some bytes in all."""

    def __init__(self, load: Load, limit: int) -> None:
        self._load, self._left = load, limit
        self._known: dict[int, TokenFactors] = {}

    def __call__(self, batch: int) -> TokenFactors:
        """The factors of a batch."""
        if batch in self._known:
            return self._known[batch]
        factors = self._load(batch)
        size = sum(t.nbytes for t in (factors.x, factors.g, factors.ids, factors.e) if t is not None)
        if size <= self._left:
            self._left -= size
            self._known[batch] = factors
        return factors
