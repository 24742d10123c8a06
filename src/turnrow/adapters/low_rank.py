"""The two thin matrices whose product is what RoCoFT changed in a weight."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch

__all__ = ["low_rank_factors"]


def low_rank_factors(
    tensors: Mapping[str, torch.Tensor], rows: ModuleType, columns: ModuleType, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with B A the change, exactly; of fused experts A (E, r, in) and B (E, out, r).

    Args:
        tensors: of one weight in an adapter file, by their names there; rows, columns, or both.
        rows, columns: the equations, of `turnrow.ops` or of `turnrow.ops.experts`.
        out_features, in_features: of the weight.
    """
    pairs = []
    rows_index = tensors["rocoft_row_index"].long() if "rocoft_row" in tensors else None
    if rows_index is not None:
        pairs.append(rows.lora_factors(tensors["rocoft_row"], rows_index, out_features))
    if "rocoft_column" in tensors:
        delta = tensors["rocoft_column"]
        if rows_index is not None:
            delta = columns.spread(delta, columns.others(rows_index, out_features), out_features)
        pairs.append(columns.lora_factors(delta, tensors["rocoft_column_index"].long(), in_features))
    return torch.cat([a for a, _ in pairs], dim=-2), torch.cat([b for _, b in pairs], dim=-1)
