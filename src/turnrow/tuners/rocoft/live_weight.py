"""A fused weight of experts as the code of a model reads it, so that its gradient is taken from inputs and outputs.

The experts' code reads a weight as it likes: expert by expert, gathered for each token, or whole for a grouped product. During
a training forward it reads a `LiveWeight`, a tensor with the same values. The products that transformers makes of it are
recognised, computed as they would be, and given the gradient of the trained rows, columns or entries alone. Anything else that
is done with it is right too: to autograd it is a function of the trained differences (`turnrow.ops.experts.whole_weight`), whose
backward pass forms the gradient of the whole weight and cuts out what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from turnrow.ops.experts import Routing, attach_gradient, whole_weight
from turnrow.tuners.rocoft.parts import PARTS, Part

__all__ = ["LiveWeight", "live_weight"]


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
class _View:
    """What of the weight a tensor is."""

    trained: tuple[_Trained, ...]

    flipped: bool
    """The last two dimensions are (in, out)."""

    expert: int | None = None
    """The one expert whose matrix it is."""

    numbers: Tensor | None = None
    """The experts, one for each token, whose matrices were gathered."""

    @property
    def whole(self) -> bool:
        return self.expert is None and self.numbers is None


class LiveWeight(Tensor):
    """The weight or a part of it; see the module."""

    view_of: _View

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over the known products, leave everything else to torch."""
        known = _KNOWN.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            result = NotImplemented if known is None else known(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if result is NotImplemented else result


def live_weight(weight: Tensor, parts: tuple[Part, ...], *, transposed: bool) -> LiveWeight:
    """`weight`, which holds the changes of `parts` already, to be read by the code of a model in one forward.

    Args:
        weight: (E, out, in); with `transposed`, (E, in, out).
        parts: those whose parameter is trained, at least one.
        transposed: how `weight` is stored.
    """
    trained = tuple(_Trained(part, part.delta()) for part in parts)
    whole = whole_weight(weight, [(t.part.ops, t.delta, t.part.index) for t in trained], transposed=transposed)
    return _mark(whole, _View(trained, flipped=transposed))


def _mark(tensor: Tensor, view: _View) -> LiveWeight:
    marked = tensor.as_subclass(LiveWeight)
    marked.view_of = view
    return marked


def _values(weight: Tensor) -> Tensor:
    """A plain tensor without history."""
    return weight.detach()


def _is_plain(*tensors: Any) -> bool:
    return not any(isinstance(tensor, LiveWeight) for tensor in tensors)


# --- reading ---------------------------------------------------------------------------------------------------------


def _getitem(weight: Any, key: Any) -> Any:
    if not isinstance(weight, LiveWeight) or not weight.view_of.whole:
        return NotImplemented
    if isinstance(key, Tensor) and (key.is_floating_point() or key.dtype in (torch.bool, torch.uint8)):
        return NotImplemented
    if isinstance(key, Tensor) and key.dim() == 1:
        return _mark(Tensor.__getitem__(weight, key), replace(weight.view_of, numbers=key))
    if (isinstance(key, Tensor) and key.dim() == 0) or (isinstance(key, int) and not isinstance(key, bool)):
        number = int(key) % len(weight)
        return _mark(Tensor.__getitem__(weight, key), replace(weight.view_of, expert=number))
    return NotImplemented


def _transpose(weight: Tensor, dim0: int, dim1: int) -> Any:
    last = {weight.dim() - 1, weight.dim() - 2}
    if not isinstance(weight, LiveWeight) or {dim0 % weight.dim(), dim1 % weight.dim()} != last:
        return NotImplemented
    return _mark(weight.transpose(dim0, dim1), replace(weight.view_of, flipped=not weight.view_of.flipped))


def _transpose_last(weight: Tensor, *_: Any) -> Any:
    """`.mT`, and `.T` and `.t()` of a matrix."""
    return _transpose(weight, -2, -1) if weight.dim() == 2 else NotImplemented


def _transpose_matrices(weight: Tensor, *_: Any) -> Any:
    return _transpose(weight, -2, -1)


# --- products --------------------------------------------------------------------------------------------------------


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, LiveWeight) or weight.view_of.expert is None or weight.view_of.flipped:
        return NotImplemented
    if not _is_plain(x, bias):
        return NotImplemented
    return _attach_to_expert(torch.nn.functional.linear(x, _values(weight), bias), x, weight.view_of)


def _matmul(x: Any, weight: Any) -> Any:
    """x W^T with the matrix of one expert."""
    if not isinstance(weight, LiveWeight) or weight.view_of.expert is None or not weight.view_of.flipped:
        return NotImplemented
    if not _is_plain(x) or x.dim() < 2:
        return NotImplemented
    return _attach_to_expert(x @ _values(weight), x, weight.view_of)


def _bmm(first: Any, second: Any) -> Any:
    """The tokens of each expert with its matrix, or one token with each gathered matrix, on either side."""
    if isinstance(second, LiveWeight) and _is_plain(first) and second.view_of.flipped:
        view, x = second.view_of, first
        if view.whole:
            routing = Routing.of_equal_shares(x.shape[0], x.shape[1], x.device)
        elif view.numbers is not None and x.shape[1] == 1:
            routing = Routing.of_numbers(view.numbers, _count(view))
        else:
            return NotImplemented
        return _attach(torch.bmm(x, _values(second)), x, view, routing)
    if isinstance(first, LiveWeight) and _is_plain(second) and not first.view_of.flipped:
        view, x = first.view_of, second
        if view.numbers is None or x.shape[2] != 1:
            return NotImplemented
        routing = Routing.of_numbers(view.numbers, _count(view))
        return _attach(torch.bmm(_values(first), x), x.squeeze(2), view, routing)
    return NotImplemented


def _grouped_mm(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Tokens sorted by expert, each with the matrix of its expert."""
    if not isinstance(weight, LiveWeight) or not weight.view_of.whole or not weight.view_of.flipped:
        return NotImplemented
    if not _is_plain(x, bias) or x.dim() != 2 or offs is None:
        return NotImplemented
    y = torch._grouped_mm(x, _values(weight), offs=offs, bias=bias, out_dtype=out_dtype)
    return _attach(y, x, weight.view_of, Routing(offs))


def _count(view: _View) -> int:
    return len(view.trained[0].part.index)


def _attach(y: Tensor, x: Tensor, view: _View, routing: Routing) -> Tensor:
    for t in view.trained:
        y = attach_gradient(t.part.ops, y, x, t.delta, t.part.index, routing)
    return y


def _attach_to_expert(y: Tensor, x: Tensor, view: _View) -> Tensor:
    """The plain equations do for a single expert."""
    assert view.expert is not None
    for t in view.trained:
        y = PARTS[t.part.name].attach_gradient(y, x, t.delta_of[view.expert], t.index_of[view.expert])
    return y


_KNOWN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mT.__get__: _transpose_matrices,  # type: ignore[attr-defined]  # a descriptor, not a tensor
    Tensor.T.__get__: _transpose_last,  # type: ignore[attr-defined]
    Tensor.t: _transpose_last,
    torch.t: _transpose_last,
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
}
if hasattr(torch, "_grouped_mm"):  # new in torch 2.8
    _KNOWN[torch._grouped_mm] = _grouped_mm
