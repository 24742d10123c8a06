"""theta and alpha whole, as peft's files hold them, of a layer that holds those of some pairs alone.

A state dict shows them whole, with angle 0 and scale 1 for the pairs that are not turned; what is loaded may be either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turnrow.errors import AdapterError, UserError
from turnrow.ops import pairs

__all__ = ["IDENTITY", "keep_whole_in_state_dicts"]

IDENTITY = {"road_theta": 0.0, "road_alpha": 1.0}
"""What turns and scales nothing."""


def keep_whole_in_state_dicts(layer: nn.Module) -> None:
    """Let the state dicts of a `RoadLinear` be those of peft's."""
    layer.register_state_dict_post_hook(_spread)
    layer.register_load_state_dict_pre_hook(_take_out)


def _spread(layer: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for adapter, places in layer.road_places.items():
        for kind, rest in IDENTITY.items():
            key = f"{prefix}{kind}.{adapter}"
            if key not in state:
                continue
            if hasattr(getattr(layer, kind)[adapter], "ds_id"):
                raise UserError(
                    f"adapter {adapter!r} turns some pairs alone (blocks), which DeepSpeed's ZeRO-3 does not go with: its parameters "
                    "cannot be put together here. Use FSDP, or leave out blocks"
                )
            values = state[key]
            if hasattr(values, "full_tensor"):  # FSDP: every process asks for the state dict, and holds a piece
                values = values.full_tensor()
            state[key] = pairs.spread(values.detach(), places.to(values.device), layer.size_of(adapter), rest)


def _take_out(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for adapter, places in layer.road_places.items():
        for kind, rest in IDENTITY.items():
            key = f"{prefix}{kind}.{adapter}"
            values = state.get(key)
            if values is None or values.shape != (layer.size_of(adapter),):
                continue  # held as the layer holds it, or an error that torch reports
            at = places.to(values.device)
            if not _is_identity(values, at, rest):
                raise AdapterError(
                    f"{key} turns or scales pairs outside of the blocks that its configuration names: the file is not of this "
                    "configuration. Load it without blocks"
                )
            state[key] = values[at]


def _is_identity(values: Tensor, besides: Tensor, rest: float) -> bool:
    outside = torch.ones(len(values), dtype=torch.bool, device=values.device).index_fill(0, besides, False)
    return bool((values[outside] == rest).all())
