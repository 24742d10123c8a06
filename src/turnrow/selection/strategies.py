"""Selection strategies: from the size of a dimension, or from a score for each of its numbers, to the chosen ones.

A dimension is the rows, the columns or the entries of one weight matrix. Every function returns its choice in ascending
order, so that the values that are trained lie in memory as the weight has them.

=============  =====================================================================================================
`first`        0 .. r - 1, the default of the RoCoFT paper (Kowsher et al., ACL 2025)
`last`         the r highest numbers
`uniform`      evenly spaced, both ends among them
`random`       r different numbers, each set equally likely
`wanda_max`    the r largest scores |W_ij| ||X_j||_2, summed over a row or a column (Sun et al., 2023; the paper's figure 3)
`wanda_min`    the r smallest of them
`wanda_mixed`  half largest, half smallest; of an odd r the larger half is of the largest
`gradient`     the r largest sums of |G|, G the gradient of the weight on a calibration batch
`fisher`       the r largest sums of G^2
=============  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from turnrow.errors import UserError, near_matches
from turnrow.selection.indices import plural

__all__ = ["STRATEGIES", "Part", "Strategy", "check_strategy", "choose", "choose_by_score", "first", "needs_data"]

Strategy = Literal[
    "first", "last", "uniform", "random", "wanda_max", "wanda_min", "wanda_mixed", "gradient", "fisher"
]  # fmt: skip
Part = Literal["row", "column", "entry"]


def first(size: int, r: int) -> Tensor:
    """The first r of `size` rows or columns, (r,) int64: the default of the RoCoFT paper."""
    return torch.arange(r)


def _last(size: int, r: int) -> Tensor:
    return torch.arange(size - r, size)


def _uniform(size: int, r: int) -> Tensor:
    if r == 1:
        return torch.tensor([(size - 1) // 2])
    # i (size - 1) / (r - 1), rounded in integers: steps of at least one, so no number comes twice.
    return (2 * torch.arange(r) * (size - 1) + r - 1) // (2 * (r - 1))


def _largest(scores: Tensor, r: int) -> Tensor:
    # The r-th largest value does not depend on how the device orders ties; among those that equal it the first are taken.
    threshold = scores.topk(r).values.min()
    above = (scores > threshold).nonzero().flatten()
    equal = (scores == threshold).nonzero().flatten()[: r - len(above)]
    return torch.cat([above, equal]).sort().values


def _smallest(scores: Tensor, r: int) -> Tensor:
    return _largest(-scores, r)


def _largest_and_smallest(scores: Tensor, r: int) -> Tensor:
    top = _largest(scores, (r + 1) // 2)
    if r == 1:
        return top
    rest = scores.index_fill(0, top, float("inf"))
    return torch.cat([top, _smallest(rest, r // 2)]).sort().values


_BY_SIZE: dict[str, Callable[[int, int], Tensor]] = {"first": first, "last": _last, "uniform": _uniform}
_BY_SCORE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "wanda_max": _largest,
    "wanda_min": _smallest,
    "wanda_mixed": _largest_and_smallest,
    "gradient": _largest,
    "fisher": _largest,
}

STRATEGIES: tuple[str, ...] = (*_BY_SIZE, "random", *_BY_SCORE)
"""All names, those that need no data first."""


def check_strategy(strategy: object, name: str = "selection") -> str:
    """Return `strategy`, or refuse it by the `name` of the setting that holds it.

    Raises:
        UserError: there is no such strategy; lists those there are, with near matches.
    """
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise UserError(
            f"{name} is {strategy!r}; it must be one of {', '.join(map(repr, STRATEGIES))}"
            f"{near_matches(str(strategy), STRATEGIES)}"
        )
    return strategy


def needs_data(strategy: str) -> bool:
    """Whether a strategy goes by what a model does with data, rather than by the size of the weight alone."""
    return strategy in _BY_SCORE


def choose(
    strategy: str,
    size: int,
    count: int,
    *,
    among: Tensor | None = None,
    seed: int = 0,
    module: str = "",
    part: Part | str = "row",
) -> Tensor:
    """Choose `count` of the numbers 0 .. size - 1 without looking at data.

    Args:
        strategy: "first", "last", "uniform" or "random".
        size: how many rows, columns or entries the weight has.
        count: how many to choose.
        among: (n,) int64 on the CPU, ascending: the numbers that may be chosen; None allows all.
        seed: decides "random", together with `module` and `part`, so that no two dimensions of a model get the same
            numbers. Drawn on the CPU: the choice is the same whatever device the model is on.
        module: name of the module, also for messages.
        part: what is numbered: "row", "column" or "entry".

    Returns:
        (count,) int64 on the CPU, ascending.

    Raises:
        UserError: an unknown strategy, one that needs data, or a count that is not in 1 .. size, or 1 .. n.
    """
    check_strategy(strategy)
    if needs_data(strategy):
        raise UserError(
            f"selection {strategy!r} needs data, and module {module!r} was given none: choose by "
            "turnrow.select(model, batches), or take one of 'first', 'last', 'uniform', 'random'"
        )
    allowed = size if among is None else len(among)
    _check_count(count, allowed, size, module, part)
    if strategy == "random":
        chosen = torch.randperm(allowed, generator=_generator(seed, module, part))[:count].sort().values
    else:
        chosen = _BY_SIZE[strategy](allowed, count)
    return chosen if among is None else among[chosen]


def choose_by_score(
    strategy: str,
    scores: Tensor,
    count: int,
    *,
    among: Tensor | None = None,
    module: str = "",
    part: Part | str = "row",
) -> Tensor:
    """Choose `count` numbers by their scores; of equal scores the lower number wins.

    Args:
        strategy: one of those that need data; it says whether large or small scores are wanted, not what they are made of.
        scores: (size,), floating point, a score for each row, column or entry.
        count: how many to choose.
        among: as in `choose`, on any device.
        module: name of the module, for messages.
        part: what is numbered: "row", "column" or "entry".

    Returns:
        (count,) int64 on the device of `scores`, ascending.

    Raises:
        UserError: a score is not finite, or the count is not in 1 .. size; names the module.
    """
    allowed = scores if among is None else scores[among.to(scores.device)]
    _check_count(count, len(allowed), len(scores), module, part)
    finite = torch.isfinite(scores)
    if not finite.all():
        wrong = int((~finite).nonzero()[0])
        raise UserError(
            f"the {strategy} score of {part} {wrong} of module {module!r} is {scores[wrong].item()}, and "
            f"{int((~finite).sum())} of {len(scores)} are not finite: the model gives infinite or undefined values on this "
            "data; look for such values in the weights, or calibrate in float32"
        )
    chosen = _BY_SCORE[strategy](allowed, count)
    return chosen if among is None else among.to(scores.device)[chosen]


def _check_count(count: int, allowed: int, size: int, module: str, part: str) -> None:
    if not 1 <= count <= allowed:
        own = f", {allowed} of them within the part that is allowed" if allowed < size else ""
        raise UserError(
            f"{count} {plural(part)} are to be chosen in module {module!r}, which has {size}{own}; ask for 1 to {allowed}, or give this "
            "module its own rank in rank_pattern"
        )


def _generator(seed: int, module: str, part: str) -> torch.Generator:
    # Python's own hash of a text differs from process to process.
    digest = blake2b(f"{seed}/{part}/{module}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
