"""RoCoFT in a batch of several adapters: what a layer stacks for the samples, and how it is added to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.errors import UserError
from turnrow.ops import batched
from turnrow.tuners._mixed_batch import MixedBatch
from turnrow.tuners._quantized import quantization_backend
from turnrow.tuners.rocoft.parts import Part

__all__ = ["StackedParts", "add_bias", "stack_bias", "stack_parts"]

_LAST = (nn.Linear, Conv1D, nn.LayerNorm)
"""Their bias lies along the last dimensions of the output."""

_SECOND = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Their bias lies along the second."""


@dataclass(frozen=True, eq=False)
class StackedParts:
    """What the adapters of a batch trained in one weight."""

    rows: batched.Rows | None
    columns: batched.Columns | None
    entries: batched.Entries | None
    bias: Tensor | None

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, T, out) with the change of each sample's adapter, for x (B, T, in)."""
        if self.rows is not None:
            y = batched.add_rows(y, x, self.rows)
        if self.columns is not None:
            y = batched.add_columns(y, x, self.columns)
        if self.entries is not None:
            y = batched.add_entries(y, x, self.entries)
        if self.bias is not None:
            y = batched.add_bias(y, self.bias, dim=2)
        return y


def stack_parts(
    parts: Sequence[Sequence[Part]], bias: Tensor | None, out_features: int, in_features: int, dtype: torch.dtype
) -> StackedParts | None:
    """Stack the parts of each sample's adapter beside the biases; None if there is nothing."""
    by_name: dict[str, list[batched.Chosen | None]] = {name: [] for name in ("row", "column", "entry")}
    for of_sample in parts:
        for name, chosen in by_name.items():
            pieces = [part for part in of_sample if part.name == name]
            chosen.append(_joined(pieces, 1 if name == "column" else 0) if pieces else None)
    stacked = StackedParts(
        batched.stack_rows(by_name["row"], dtype),
        batched.stack_columns(by_name["column"], dtype),
        batched.stack_entries(by_name["entry"], out_features, in_features),
        bias,
    )
    return None if all(part is None for part in vars(stacked).values()) else stacked


def _joined(pieces: Sequence[Part], dim: int) -> batched.Chosen:
    """One part; or, in the middle of re-selection, what is trained and what is settled side by side."""
    if len(pieces) == 1:
        return pieces[0].delta(), pieces[0].index
    return torch.cat([piece.delta() for piece in pieces], dim), torch.cat([piece.index for piece in pieces])


def stack_bias(biases: nn.ParameterDict, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
    """The trained difference to the bias for each sample, (B, *shape of the bias); None if there are none."""
    some = next((biases[name] for name in names if name in biases), None)
    if some is None:
        return None
    nothing = torch.zeros_like(some, requires_grad=False)
    return torch.stack([biases.get(name, nothing) for name in names]).to(dtype)


def add_bias(y: Tensor, bias: Tensor, base: nn.Module, batch: MixedBatch) -> Tensor:
    """The output y of `base` with a difference to the bias for each sample, (B, *shape of the bias).

    Raises:
        UserError: `base` is of a kind that is not known to add its bias to its output.
    """
    by_sample = y.reshape(len(batch.names), batch.copies_in(y), *y.shape[1:])
    if type(base) in _LAST or quantization_backend(base) is not None:
        dim = by_sample.dim() - bias.dim() + 1
    elif type(base) in _SECOND:
        dim = 2
    else:
        raise UserError(
            f"adapter_names cannot be used with the trained bias of a {type(base).__name__}: where its output takes the bias is not "
            "known. Train the adapter with bias='rocoft_only' or 'none', or activate one adapter by set_adapter()"
        )
    return batched.add_bias(by_sample, bias, dim).reshape(y.shape)
