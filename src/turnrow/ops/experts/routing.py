"""Which expert each token goes to, and sums over the tokens of each expert."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from turnrow.ops.tokens import token_product

__all__ = ["Routing", "segment_product"]


@dataclass(frozen=True, eq=False)
class Routing:
    """Tokens sorted by expert: those of expert e are ``ends[e - 1]`` to ``ends[e] - 1`` of the sorted ones."""

    ends: Tensor
    """(E,) integers. Tokens after the last end belong to no expert."""

    order: Tensor | None = None
    """(tokens,) int64, the permutation that sorts them; None where they are sorted already."""

    @classmethod
    def of_numbers(cls, experts: Tensor, count: int) -> Routing:
        """Each token with the number of its expert, (tokens,), out of `count`."""
        ordered, order = experts.sort(stable=True)
        # No counting of the numbers: its result would have to be waited for on a device.
        return cls(torch.searchsorted(ordered, torch.arange(count, device=experts.device), right=True), order)

    @classmethod
    def of_equal_shares(cls, count: int, tokens_each: int, device: torch.device) -> Routing:
        """The same number of tokens for each of `count` experts, one expert after another."""
        return cls(tokens_each * torch.arange(1, count + 1, device=device))

    def sort(self, tokens: Tensor) -> Tensor:
        """A tensor whose first dimension runs over the tokens, sorted by expert."""
        return tokens if self.order is None else tokens[self.order]

    def experts_of(self, tokens: int) -> Tensor:
        """The expert of each sorted token, (tokens,) int64."""
        numbers = torch.arange(tokens, dtype=self.ends.dtype, device=self.ends.device)
        return torch.searchsorted(self.ends, numbers, right=True).clamp_(max=len(self.ends) - 1)

    def segments(self) -> list[tuple[int, int]]:
        """First token, and the one after the last, of each expert."""
        return list(pairwise([0, *self.ends.tolist()]))


def segment_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a_e^T b_e over the tokens of each expert: (E, r, n) for a (tokens, r) and b (tokens, n) of one dtype, sorted by expert.

    An expert without tokens gets zeros.
    """
    product = b.new_zeros(len(ends), a.shape[1], b.shape[1])
    for expert, (first, last) in enumerate(Routing(ends).segments()):
        if first < last:
            product[expert] = token_product(a[first:last], b[first:last])
    return product
