"""The pairs that a RoAd adapter may turn, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from turnrow.ops import pairs
from turnrow.ops.subspace import most_specific, subspace

__all__ = ["own_places"]


def own_places(config: Mapping[str, Any], module: str, out_features: int) -> Tensor | None:
    """Where in theta and alpha of a module an adapter's own pairs lie, int64 ascending; None where all are its own.

    Args:
        config: ``adapter_config.json``, its variant and group size checked.

    Raises:
        UserError: its ``blocks`` name no pairs, or some that the module does not have.
    """
    blocks = config.get("blocks")
    part = most_specific(blocks, module) if isinstance(blocks, dict) else blocks
    if part is None:
        return None
    numbers = subspace(part, out_features // 2, where="the configuration's blocks", what="pairs")
    return pairs.places(config["variant"], config["group_size"], numbers)
