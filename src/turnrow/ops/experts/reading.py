"""A fused weight of experts as the code of a model reads it, so that whatever is multiplied with it can be followed.

The experts' code reads a weight as it likes: expert by expert, gathered for each token, or whole for a grouped product. A
`ReadWeight` is a tensor with the same values that knows the products which transformers makes of it, computes them as they would be,
and tells a `Reader` of each: the tokens, and which of them went to which expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from turnrow.ops.experts.routing import Routing

__all__ = ["ReadWeight", "Reader", "read_weight"]


class Reader(Protocol):
    """Is told of every use of a weight in a forward."""

    def routed(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """Each token of x (..., in) went to an expert; returns what the model's code gets for the product y (..., out)."""

    def of_expert(self, y: Tensor, x: Tensor, expert: int) -> Tensor:
        """All tokens of x (..., in) went to one expert; returns as `routed`."""

    def otherwise(self, function: Any, result: Any) -> None:
        """The weight, or a part of it, was used by a function of torch that is none of the known products and gave `result`."""


@dataclass(frozen=True, eq=False)
class _View:
    """What of the weight a tensor is."""

    reader: Reader

    count: int
    """Of the experts."""

    flipped: bool
    """The last two dimensions are (in, out)."""

    expert: int | None = None
    """The one expert whose matrix it is."""

    numbers: Tensor | None = None
    """The experts, one for each token, whose matrices were gathered."""

    @property
    def whole(self) -> bool:
        return self.expert is None and self.numbers is None


class ReadWeight(Tensor):
    """The weight or a part of it; see the module."""

    view_of: _View

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over the known products, leave everything else to torch."""
        known = _KNOWN.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            result = NotImplemented if known is None else known(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            result = func(*args, **(kwargs or {}))
            for weight in (*args, *(kwargs or {}).values()):
                if isinstance(weight, ReadWeight):
                    weight.view_of.reader.otherwise(func, result)
            return result


def read_weight(weight: Tensor, reader: Reader, *, transposed: bool) -> ReadWeight:
    """`weight`, to be read by the code of a model.

    Args:
        weight: (E, out, in); with `transposed`, (E, in, out).
        reader: is told of its uses.
        transposed: how `weight` is stored.
    """
    return _mark(weight, _View(reader, len(weight), flipped=transposed))


def _mark(tensor: Tensor, view: _View) -> ReadWeight:
    marked = tensor.as_subclass(ReadWeight)
    marked.view_of = view
    return marked


def _values(weight: Tensor) -> Tensor:
    """A plain tensor without history."""
    return weight.detach()


def _is_plain(*tensors: Any) -> bool:
    return not any(isinstance(tensor, ReadWeight) for tensor in tensors)


# --- reading ---------------------------------------------------------------------------------------------------------


def _getitem(weight: Any, key: Any) -> Any:
    if not isinstance(weight, ReadWeight) or not weight.view_of.whole:
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
    if not isinstance(weight, ReadWeight) or {dim0 % weight.dim(), dim1 % weight.dim()} != last:
        return NotImplemented
    return _mark(weight.transpose(dim0, dim1), replace(weight.view_of, flipped=not weight.view_of.flipped))


def _transpose_last(weight: Tensor, *_: Any) -> Any:
    """`.mT`, and `.T` and `.t()` of a matrix."""
    return _transpose(weight, -2, -1) if weight.dim() == 2 else NotImplemented


def _transpose_matrices(weight: Tensor, *_: Any) -> Any:
    return _transpose(weight, -2, -1)


# --- products --------------------------------------------------------------------------------------------------------


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, ReadWeight) or weight.view_of.expert is None or weight.view_of.flipped:
        return NotImplemented
    if not _is_plain(x, bias):
        return NotImplemented
    y = torch.nn.functional.linear(x, _values(weight), bias)
    return weight.view_of.reader.of_expert(y, x, weight.view_of.expert)


def _matmul(x: Any, weight: Any) -> Any:
    """x W^T with the matrix of one expert."""
    if not isinstance(weight, ReadWeight) or weight.view_of.expert is None or not weight.view_of.flipped:
        return NotImplemented
    if not _is_plain(x) or x.dim() < 2:
        return NotImplemented
    return weight.view_of.reader.of_expert(x @ _values(weight), x, weight.view_of.expert)


def _bmm(first: Any, second: Any) -> Any:
    """The tokens of each expert with its matrix, or one token with each gathered matrix, on either side."""
    if isinstance(second, ReadWeight) and _is_plain(first) and second.view_of.flipped:
        view, x = second.view_of, first
        if view.whole:
            routing = Routing.of_equal_shares(x.shape[0], x.shape[1], x.device)
        elif view.numbers is not None and x.shape[1] == 1:
            routing = Routing.of_numbers(view.numbers, view.count)
        else:
            return NotImplemented
        return view.reader.routed(torch.bmm(x, _values(second)), x, routing)
    if isinstance(first, ReadWeight) and _is_plain(second) and not first.view_of.flipped:
        view, x = first.view_of, second
        if view.numbers is None or x.shape[2] != 1:
            return NotImplemented
        routing = Routing.of_numbers(view.numbers, view.count)
        return view.reader.routed(torch.bmm(_values(first), x), x.squeeze(2), routing)
    return NotImplemented


def _grouped_mm(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Tokens sorted by expert, each with the matrix of its expert."""
    if not isinstance(weight, ReadWeight) or not weight.view_of.whole or not weight.view_of.flipped:
        return NotImplemented
    if not _is_plain(x, bias) or x.dim() != 2 or offs is None:
        return NotImplemented
    y = torch._grouped_mm(x, _values(weight), offs=offs, bias=bias, out_dtype=out_dtype)
    return weight.view_of.reader.routed(y, x, Routing(offs))


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
