"""What an adapter brings to a layer, in the form in which it lies in a slot: its `Part`s, by kind.

    rows       delta (r, in), index (r,)
    columns    delta (r, out), index (r,): the transpose of the file's, with zeros in the rows that are trained as rows
    entries    delta (m,), rows (m,), columns (m,)
    lora       A (r, in), B (r, out): B transposed, times alpha / r
    bias       (out,), a difference
    turn:G     c + i s (out / 2,) complex, of RoAd's blocks that turn and scale neighbours
    shears:G   a, b (out / g, g / 2), d (out,): see `pairs.Shears`
    blocks:G   c1, s1, c2, s2 (out / g, g / 2)

with G the group size. Deltas are kept in the dtype of the model, rounded once, as merging would round the sum. RoAd's
coefficients are kept in float32: they are ones and zeros with small differences, which bfloat16 would round away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turnrow.adapters import AdapterFile
from turnrow.errors import AdapterError
from turnrow.ops import columns, pairs
from turnrow.serving.layers import ServedLayer
from turnrow.serving.store.lora import lora_scale

__all__ = ["Part", "Parts", "parts_of"]


@dataclass(frozen=True, eq=False)
class Part:
    """One of the things that an adapter brings to a layer."""

    kind: str
    tensors: tuple[Tensor, ...]
    """On the host; what they are depends on the kind."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


Parts = Mapping[str, list[Part]]
"""By name of the layer."""


def parts_of(adapter: AdapterFile, layers: Mapping[str, ServedLayer], dtype: torch.dtype) -> Parts:
    """The parts of an adapter that was checked.

    Args:
        adapter: of RoCoFT, RoAd or LoRA.
        layers: those of the model.
        dtype: of the model.

    Raises:
        AdapterError: a value is too large for the model's dtype.
    """
    parts = {}
    for name, tensors in adapter.modules.items():
        if adapter.method == "LORA":
            parts[name] = [_lora(adapter, name, tensors, dtype)]
        elif adapter.method == "ROAD":
            parts[name] = [_rotation(adapter.config, tensors)]
        else:
            parts[name] = list(_rocoft(tensors, layers[name], dtype))
        for part in parts[name]:
            if not all(bool(torch.isfinite(t).all()) for t in part.tensors if t.is_floating_point() or t.is_complex()):
                raise AdapterError(
                    f"{adapter.path}: the {part.kind} of {name!r} hold values that {str(dtype).removeprefix('torch.')}, the dtype of the "
                    "model, cannot hold: serve the model in float32 or bfloat16"
                )
    return parts


def _rocoft(tensors: Mapping[str, Tensor], layer: ServedLayer, dtype: torch.dtype) -> list[Part]:
    found = []
    if "rocoft_row" in tensors:
        found.append(Part("rows", (_copy(tensors["rocoft_row"], dtype), _index(tensors["rocoft_row_index"]))))
    if "rocoft_column" in tensors:
        delta = tensors["rocoft_column"]
        if "rocoft_row" in tensors:
            rest = columns.others(tensors["rocoft_row_index"].long(), layer.out_features)
            delta = columns.spread(delta, rest, layer.out_features)
        found.append(Part("columns", (_copy(delta.t(), dtype), _index(tensors["rocoft_column_index"]))))
    if "rocoft_entry" in tensors:
        index = tensors["rocoft_entry_index"].long()
        at_row = torch.div(index, layer.in_features, rounding_mode="floor")
        found.append(Part("entries", (_copy(tensors["rocoft_entry"], dtype), at_row, index % layer.in_features)))
    if "rocoft_bias" in tensors:
        found.append(Part("bias", (_copy(tensors["rocoft_bias"], dtype),)))
    return found


def _rotation(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    theta, alpha = tensors["road_theta"].float(), tensors["road_alpha"].float()
    group = config["group_size"]
    prepared = pairs.prepare(pairs.coefficients(config["variant"], group, theta, alpha))
    if isinstance(prepared, Tensor):
        return Part(f"turn:{group}", (prepared.flatten().clone(),))
    if isinstance(prepared, pairs.Shears):
        return Part(f"shears:{group}", (prepared.a, prepared.b, prepared.d))
    return Part(f"blocks:{group}", tuple(entry.clone() for entry in prepared))


def _lora(adapter: AdapterFile, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Part:
    a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    scale = lora_scale(adapter, name, len(a))
    return Part("lora", (_copy(a, dtype), _copy(b.float().t() * scale, dtype)))


def _index(values: Tensor) -> Tensor:
    return values.to(torch.int64, copy=True)


def _copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of its own: what a file was mapped to may go."""
    return values.detach().to(dtype, copy=True).contiguous()
