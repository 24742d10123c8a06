"""The pairs that a RoAd adapter may turn, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from turnrow.ops import pairs
from turnrow.ops.subspace import of_module, subspace

__all__ = ["own_places"]


def own_places(config: Mapping[str, Any], module: str, size: int) -> Tensor | None:
    """Where in theta and alpha of a module an adapter's own pairs lie, int64 ascending; None where all are its own.

    Args:
        config: ``adapter_config.json``, its variant and group size checked.
        size: of the module's theta.

    Raises:
        UserError: its ``blocks`` name no pairs, or some that the module does not have.
    """
    part = of_module(config.get("blocks"), module)
    if part is None:
        return None
    numbers = subspace(
        part, size // pairs.parameter_size(config["variant"], 2), where="the configuration's blocks", what="pairs"
    )
    return pairs.places(config["variant"], config["group_size"], numbers)
