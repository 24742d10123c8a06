"""W0 + delta: a trained difference on top of values that were kept aside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["BeforeBackward", "adapted", "unviewed", "without_autocast"]

BeforeBackward: TypeAlias = Callable[[], None] | None
"""Puts back what a weight held in the forward pass, before the backward pass reads it."""


def adapted(kept: Tensor, delta: Tensor) -> Tensor:
    """kept + delta, summed in the wider of the two dtypes and rounded once to the dtype of `kept`.

    Training, merging and export all round here, so a merged model computes exactly what was trained.
    """
    return (kept + delta).to(kept.dtype)


def unviewed(y: Tensor) -> Tensor:
    """The whole tensor that y is a mere reshaping of, or y itself.

    A linear layer with a bias returns a view of its two-dimensional product. To autograd, handing on a view in place means
    copying its gradient three times in the backward pass; handing on the product itself costs nothing.
    """
    base = y._base
    if base is not None and base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous():
        return base
    return y


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """The block computes in the dtypes it is given, on the device of `tensor`."""
    device = tensor.device.type
    # Entering the context costs more than asking whether it is needed.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
