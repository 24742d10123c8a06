"""How the values of several adapters become one: sums with weights, and peft's ways to thin out and to settle signs.

What is thinned out is an adapter's own values. Where adapters are spread over what any of them changes, the zeros of
the others count for nothing: a density of 0.5 keeps half of each adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune, task_arithmetic
from torch import Tensor

from turnrow.adapters.numbers import is_number
from turnrow.errors import UserError, near_matches

__all__ = ["Combination", "Kind", "check_combination"]

Kind = Literal["linear", "mean", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
"""The names are those of peft's ``add_weighted_adapter``, and ``mean``.

- ``linear``: the sum of weight times value.
- ``mean``: the same with weights that add up to 1.
- ``magnitude_prune``: ``linear`` of the greatest values of each adapter.
- ``ties``: of those, per entry, the mean of the values on the side of the majority (Yadav et al., NeurIPS 2023, arXiv:2306.01708).
- ``dare_linear``, ``dare_ties``: the same of values drawn at random and scaled up (Yu et al., ICML 2024, arXiv:2311.03099).
"""

_THINNED: dict[str, Literal["magnitude", "random"]] = {
    "magnitude_prune": "magnitude",
    "ties": "magnitude",
    "dare_linear": "random",
    "dare_ties": "random",
}


@dataclass(frozen=True)
class Combination:
    """A kind with its settings, checked by `check_combination`."""

    kind: Kind
    weights: tuple[float, ...]
    """One an adapter."""
    density: float | None = None
    """Which share of its own values each adapter keeps; None keeps all."""

    def thin(self, values: Tensor) -> Tensor:
        """The values of one adapter that take part, zero in the place of the others. `dare_*` draws from torch's generator."""
        if self.density is None or self.density == 1:
            return values
        method = _THINNED[self.kind]
        thinned: Tensor = prune(values, self.density, method, rescale=method == "random")
        return thinned

    def combine(self, aligned: Sequence[Tensor]) -> Tensor:
        """One tensor of the adapters' tensors, all of one shape."""
        weights = torch.tensor(self.weights, dtype=aligned[0].dtype)
        if not self.kind.endswith("ties"):
            total: Tensor = task_arithmetic(list(aligned), weights)
            return total
        stacked = torch.stack(list(aligned))
        signs = calculate_majority_sign_mask(stacked)
        merged: Tensor = disjoint_merge(stacked * weights.view(-1, *(1,) * (stacked.dim() - 1)), signs)
        return merged


def check_combination(kind: str, weights: Sequence[float] | None, density: float | None, count: int) -> Combination:
    """A combination of `count` adapters.

    Args:
        kind: one of `Kind`.
        weights: one an adapter; None takes 1 for each, or 1 / count for ``mean``.
        density: for the kinds that thin out, above 0 and at most 1.

    Raises:
        UserError: a value is not allowed; names it and what is.
    """
    if kind not in get_args(Kind):
        allowed = ", ".join(map(repr, get_args(Kind)))
        raise UserError(
            f"combination is {kind!r}; it must be one of {allowed}{near_matches(str(kind), get_args(Kind))}"
        )
    if weights is None:
        weights = [1.0] * count
    if len(weights) != count:
        raise UserError(f"weights are {list(weights)}, {len(weights)} for {count} adapters: give one for each")
    if not all(is_number(weight) for weight in weights):
        raise UserError(f"weights are {list(weights)}; each must be a finite number")
    if kind == "mean":
        total = sum(weights)
        if not total:
            raise UserError(f"weights are {list(weights)}; for a mean their sum must not be zero")
        weights = [weight / total for weight in weights]
    if kind in _THINNED:
        if not is_number(density) or not 0 < density <= 1:
            raise UserError(
                f"density is {density!r}; {kind} keeps a share of each adapter's values, above 0 and at most 1"
            )
    elif density is not None:
        raise UserError(f"density is {density!r}, but {kind} keeps all values: it is for {', '.join(_THINNED)}")
    return Combination(kind, tuple(float(weight) for weight in weights), density)  # type: ignore[arg-type]
