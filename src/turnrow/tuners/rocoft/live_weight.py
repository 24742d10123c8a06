"""A fused weight of experts whose gradient is taken from inputs and outputs.

During a training forward the code of a model reads it in the place of the parameter (`turnrow.ops.experts.ReadWeight`). The products
that are recognised get the gradient of the trained rows, columns or entries alone. Anything else that is done with the weight is
right too: to autograd it is a function of the trained differences (`turnrow.ops.experts.whole_weight`), whose backward pass forms
the gradient of the whole weight and cuts out what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from turnrow.ops.experts import ReadWeight, Routing, attach_gradient, read_weight, whole_weight
from turnrow.tuners.rocoft.parts import PARTS, Part

__all__ = ["live_weight"]


@dataclass(frozen=True, eq=False)
class _Trained:
    """One trained part with its difference, which is the same tensor throughout a forward."""

    part: Part
    delta: Tensor

    @cached_property
    def delta_of(self) -> tuple[Tensor, ...]:
        """The difference expert by expert: taken apart once, so that its gradient is put together once."""
        return self.delta.unbind(0)

    @cached_property
    def index_of(self) -> tuple[Tensor, ...]:
        return self.part.index.unbind(0)


@dataclass(frozen=True, eq=False)
class _Training:
    """Gives every known product the gradients of all trained parts."""

    trained: tuple[_Trained, ...]

    def routed(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        for t in self.trained:
            y = attach_gradient(t.part.ops, y, x, t.delta, t.part.index, routing)
        return y

    def of_expert(self, y: Tensor, x: Tensor, expert: int) -> Tensor:
        """The plain equations do for a single expert."""
        for t in self.trained:
            y = PARTS[t.part.name].attach_gradient(y, x, t.delta_of[expert], t.index_of[expert])
        return y

    def otherwise(self, function: Any, result: Any) -> None:
        """Autograd sees to it."""


def live_weight(weight: Tensor, parts: tuple[Part, ...], *, transposed: bool) -> ReadWeight:
    """`weight`, which holds the changes of `parts` already, to be read by the code of a model in one forward.

    Args:
        weight: (E, out, in); with `transposed`, (E, in, out).
        parts: those whose parameter is trained, at least one.
        transposed: how `weight` is stored.
    """
    trained = tuple(_Trained(part, part.delta()) for part in parts)
    whole = whole_weight(weight, [(t.part.ops, t.delta, t.part.index) for t in trained], transposed=transposed)
    return read_weight(whole, _Training(trained), transposed=transposed)
