"""What a method trains, piece by piece: a kernel is the sum over its pieces, because kernels of disjoint parameters add.

Letters: X (T, in) inputs of a linear layer, every row a token; G (T, out) gradient of one output f_c of one sample with
respect to the outputs H of that layer; D = G^T X (out, in) the gradient of its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turnrow.analysis.ntk.layout import Layout, kind_of

if TYPE_CHECKING:
    from turnrow.analysis.ntk.factors import Call

__all__ = ["Term", "Vector", "Weight", "digest", "whole"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix of parameters whose gradient is a sum over tokens of outer products: D, or a part or an image of it."""

    key: str
    """Equal keys, equal terms."""
    modules: tuple[str, ...]
    """Linear and embedding layers that share the matrix; their gradients add up before the product is taken."""
    shape: tuple[int, int]
    """Rows and columns of what is trained, before `entries`."""
    rows: Tensor | None = None
    """(r,) int64: these output features only, G[:, rows]."""
    columns: Tensor | None = None
    """(r,) int64: these input features only, X[:, columns]."""
    down: Tensor | None = None
    """(in, r): X is replaced by X down, as where a trained matrix follows a fixed one (LoRA's B after A)."""
    entries: Tensor | None = None
    """(n,) int64 ascending: these entries of D, row by row."""
    parameter: str | None = None
    """The parameter that is trained whole; None for a part of one, or for what an adapter adds."""
    sign: int = 1
    """-1 for what two other terms of the same kernel both have, which counts once."""

    @property
    def size(self) -> int:
        """Number of trained parameters that it adds."""
        return self.sign * (math.prod(self.shape) if self.entries is None else len(self.entries))


@dataclass(frozen=True, eq=False)
class Vector:
    """Few parameters, whose gradients are formed as soon as the backward pass is over: (B, C, size) of a batch."""

    key: str
    modules: tuple[str, ...]
    """Where the gradients of several modules add up."""
    size: int
    gradient: Callable[[Call], Tensor] | None
    """From what a module was called with; None: asked from autograd, one sample at a time."""
    parameter: str | None = None


Term = Weight | Vector


def whole(layout: Layout, parameter: str) -> Term:
    """The term of a parameter that is trained whole, by the cheapest exact way that its owners allow."""
    # A module that hands its parameter on to one inside (BERT's decoder bias) is not the one that computes with it.
    owners = [(name, attribute) for name, attribute in layout.owners[parameter] if kind_of(layout.modules[name])]
    kinds = {(kind_of(layout.modules[name]), attribute) for name, attribute in owners}
    modules = tuple(dict.fromkeys(name for name, _ in owners))
    values = layout.parameters[parameter]
    key = f"whole {parameter}"
    if kinds and kinds <= {("linear", "weight"), ("embedding", "weight")} and _one_orientation(layout, modules):
        rows, columns = (
            layout.weight(modules[0]).shape if kind_of(layout.modules[modules[0]]) == "linear" else values.shape
        )
        return Weight(key, modules, (rows, columns), parameter=parameter)
    if kinds == {("linear", "bias")}:
        return Vector(key, modules, values.numel(), lambda call: call.g.sum(2), parameter)
    if len(kinds) == 1 and (only := next(iter(kinds)))[0] == "leaf":
        attribute = only[1]
        return Vector(key, modules, values.numel(), lambda call: call.leaf_gradient(attribute), parameter)
    return one_by_one(layout, parameter)


def one_by_one(layout: Layout, parameter: str) -> Vector:
    """The term of a parameter whose gradients are asked from autograd, one sample at a time."""
    return Vector(f"whole {parameter}", (), layout.parameters[parameter].numel(), None, parameter)


def _one_orientation(layout: Layout, modules: tuple[str, ...]) -> bool:
    """Whether the parameter is stored as (out, in) by all of its owners, or by none."""
    from transformers.pytorch_utils import Conv1D

    return len({isinstance(layout.modules[name], Conv1D) for name in modules}) == 1


def digest(*tensors: Tensor | None) -> str:
    """A short name for the values of some tensors."""
    state = sha256()
    for tensor in tensors:
        if tensor is None:
            state.update(b"none")
            continue
        values = tensor.detach().cpu().contiguous()
        state.update(f"{values.dtype} {tuple(values.shape)}".encode())
        if values.numel():
            state.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]
