"""The products of fused experts on tensors without values: transformers' "grouped_mm", which it takes where it is not told otherwise.

torch knows the shape of such a product in bfloat16 alone, and training takes it in float32 and float16 too. Everything around
the operator, its gradients among it, is torch's own, so the same tensors are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["GroupedProducts"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16
"""Bytes of which the rows must be a multiple, on every device."""


class GroupedProducts(TorchDispatchMode):
    """In this block a product of fused experts has a result on fake tensors, in every dtype that its kernels take.

    Raises:
        RuntimeError: a row is not aligned, which the kernels refuse in the same way.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any other operator as it is."""
        options = kwargs or {}
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype not in _DTYPES:
            return func(*args, **options)
        return _product(*args, **options)


def _product(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: None = None, out_dtype: Any = None) -> Tensor:
    """The empty result: one matrix a group where both factors, or neither, are cut into groups; else the groups side by side."""
    for factor in (a, b):
        row = max(factor.stride()[-2:]) * factor.element_size()
        if row % _ALIGNMENT:
            raise RuntimeError(
                f"a row of {row} bytes in the experts, where their kernel (grouped_mm) needs a multiple of {_ALIGNMENT}; a run "
                "would end there too"
            )
    size = [a.shape[-2], b.shape[-1]]
    if a.dim() == b.dim():
        groups = offs if a.dim() == 2 else a
        assert groups is not None  # without which torch makes no such call
        size.insert(0, len(groups))
    return a.new_empty(size, dtype=out_dtype)
