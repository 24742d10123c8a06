"""The peft tuner of RoAd: peft's own, with our layer for dense linear modules and checks before anything is replaced."""

from __future__ import annotations

from typing import Any

from peft import RoadConfig
from peft.tuners.road.model import RoadModel as PeftRoadModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from turnrow.errors import UserError
from turnrow.tuners._dense import dense_linear, features
from turnrow.tuners._experts import warn_of_untargeted_experts
from turnrow.tuners._targets import resolve_targets
from turnrow.tuners.road.layer import RoadLinear

__all__ = ["RoadModel"]


class RoadModel(PeftRoadModel):
    """A model whose target layers' outputs are rotated and scaled in pairs (RoAd).

    Made by `peft.get_peft_model(model, RoadConfig(...))`. Quantized layers get peft's own RoAd layers.
    """

    def _prepare_model(self, peft_config: RoadConfig, model: nn.Module) -> None:
        if not peft_config.inference_mode:
            warn_of_untargeted_experts(model, "RoAd turns the outputs of linear layers alone; RoCoFT trains experts")
        for name, module in resolve_targets(self, peft_config, model).items():
            out_features = _output_features(module)
            if out_features is None:
                raise UserError(
                    f"target module {name!r} is a {type(module).__name__}; RoAd rotates the output of linear layers "
                    "(torch.nn.Linear, Conv1D)"
                )
            if out_features % peft_config.group_size:
                raise UserError(
                    f"group_size is {peft_config.group_size}, which does not divide the {out_features} output features of "
                    f"module {name!r}; use an even number that does, such as {_largest_group(out_features)}"
                    if out_features % 2 == 0
                    else f"module {name!r} has an odd number of output features, {out_features}, which cannot be paired; "
                    "leave it out of target_modules"
                )

    @staticmethod
    def _create_new_module(road_config: RoadConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = dense_linear(target)
        if base is not None and type(base.weight) in (Tensor, nn.Parameter):
            return RoadLinear(target, adapter_name, config=road_config)
        return PeftRoadModel._create_new_module(road_config, adapter_name, target, **kwargs)


def _output_features(module: nn.Module) -> int | None:
    """Of dense and quantized linear layers; None for anything else."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    dense = dense_linear(base)
    if dense is not None:
        return features(dense)[0]
    return base.out_features if isinstance(base, nn.Linear) else None


def _largest_group(out_features: int) -> int:
    """The largest even divisor up to 64, peft's default group size."""
    return max(g for g in range(2, min(out_features, 64) + 1, 2) if out_features % g == 0)
