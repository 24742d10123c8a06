"""Which tokens' states an adapter turned most, over many texts and in single ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from turnrow.analysis.displacement import TokenDisplacement

__all__ = ["TextTurned", "TokenMoved", "TokenRanking"]

_TEXTS, _LONGEST = 4, 60


@dataclass(frozen=True)
class TokenMoved:
    """A token of the vocabulary."""

    token: str
    count: int
    """How often it stands in the texts."""
    turn: float
    """Mean of 1 - cos(x, x0) over its places, in the last layer."""
    magnitude: float
    """Mean of the relative change of length, in the last layer."""
    greatest: float
    """The greatest of those turns."""


@dataclass(frozen=True, eq=False)
class TextTurned:
    """One text, token by token."""

    tokens: list[str]
    layers: list[str]
    turn: list[list[float]]
    """1 - cos(x, x0), by layer and token."""


class TokenRanking:
    """Takes batches as they are measured; memory is that of the vocabulary in use, and of the first few texts.

    Args:
        name: says what a token is called, by its id.
    """

    def __init__(self, name: Callable[[int], str]) -> None:
        self._name = name
        self._sums: dict[int, list[float]] = {}
        self.texts: list[TextTurned] = []
        """The first few texts, cut to their first tokens."""

    def add(self, batch: Mapping[str, Tensor], found: TokenDisplacement) -> None:
        """Take a batch, with what `token_displacement` found of it."""
        ids = batch["input_ids"].cpu()
        turn, longer = found.turn[-1], found.magnitude[-1]
        for text in range(len(ids)):
            known = turn[text].isfinite() & longer[text].isfinite()
            for token, turned, moved in zip(
                ids[text][known].tolist(), turn[text][known].tolist(), longer[text][known].tolist(), strict=True
            ):
                sums = self._sums.setdefault(token, [0, 0.0, 0.0, 0.0])
                sums[0] += 1
                sums[1] += turned
                sums[2] += moved
                sums[3] = max(sums[3], turned)
            if len(self.texts) < _TEXTS:
                at = (~found.turn[:, text].isnan().all(0)).nonzero()[:_LONGEST, 0]
                values = torch.nan_to_num(found.turn[:, text, at])
                self.texts.append(
                    TextTurned([self._name(i) for i in ids[text, at].tolist()], found.layers, values.tolist())
                )

    def most(self, limit: int = 20) -> list[TokenMoved]:
        """The tokens turned most on the mean, furthest first."""
        order = sorted(self._sums, key=lambda token: (-self._sums[token][1] / self._sums[token][0], token))
        return [
            TokenMoved(self._name(token), int(n), turned / n, moved / n, greatest)
            for token in order[:limit]
            for n, turned, moved, greatest in [self._sums[token]]
        ]
