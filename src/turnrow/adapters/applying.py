"""What an adapter's tensors make of a weight, without a model around it: the same equations that merging in a model calls."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from turnrow.adapters.rocoft_checks import BIAS
from turnrow.ops import columns, entries, experts, pairs, rotation, rows
from turnrow.ops.delta import adapted

__all__ = ["apply", "original_values", "put_original_values"]

_PARTS: dict[str, ModuleType] = {"column": columns, "entry": entries, "row": rows}
_EXPERT_PARTS: dict[str, ModuleType] = {"column": experts.columns, "entry": experts.entries, "row": experts.rows}
# the crossing of rows and columns belongs to the rows, so they are written last


@torch.no_grad()
def apply(weight: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Merge the tensors of one module into its weight and bias, in place.

    Args:
        weight: (out, in), or (E, out, in) of fused experts; may be a transposed view.
        bias: (out,) or None.
        tensors: of a RoCoFT or RoAd adapter for this module, by parameter name.
        config: ``adapter_config.json``.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)  # as the parameters of an adapter in a model are
    tensors = {name: tensor.to(wide) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    if "road_theta" in tensors:
        blocks = pairs.coefficients(
            config["variant"], config["group_size"], tensors["road_theta"], tensors["road_alpha"]
        )
        rotation.rotate_weight_(weight, bias, blocks)
        return
    originals = original_values(weight, tensors)  # all before the first is written: rows and columns cross
    for part, ops in _parts(weight).items():
        if part not in originals:
            continue
        index, delta = tensors[f"rocoft_{part}_index"].long(), tensors[f"rocoft_{part}"]
        if part == "column" and "row" in originals:
            row_index = tensors["rocoft_row_index"].long()
            delta = ops.spread(delta, ops.others(row_index, weight.shape[-2]), weight.shape[-2])
        ops.put_(weight, index, adapted(originals[part], delta))
    if BIAS in tensors and bias is not None:
        bias.copy_(adapted(bias, tensors[BIAS]))


def original_values(weight: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a RoCoFT adapter replaces in a weight, by part, in the dtype of the weight."""
    return {
        part: ops.keep(weight, tensors[f"rocoft_{part}_index"].long())
        for part, ops in _parts(weight).items()
        if f"rocoft_{part}" in tensors
    }


def put_original_values(weight: Tensor, tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
    """Put back what `original_values` took: the weight is what it was, bit for bit."""
    for part, ops in _parts(weight).items():
        if part in originals:
            ops.put_(weight, tensors[f"rocoft_{part}_index"].long(), originals[part])


def _parts(weight: Tensor) -> dict[str, ModuleType]:
    return _EXPERT_PARTS if weight.ndim == 3 else _PARTS
