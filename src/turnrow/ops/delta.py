"""W0 + delta: a trained difference on top of values that were kept aside."""

from __future__ import annotations

from torch import Tensor

__all__ = ["adapted"]


def adapted(kept: Tensor, delta: Tensor) -> Tensor:
    """kept + delta, summed in the wider of the two dtypes and rounded once to the dtype of `kept`.

    Training, merging and export all round here, so a merged model computes exactly what was trained.
    """
    return (kept + delta).to(kept.dtype)
