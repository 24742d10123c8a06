"""The peft tuner of RoAd: peft's own, with our layer for linear modules and checks before anything is replaced."""

from __future__ import annotations

from typing import Any

from peft import RoadConfig
from peft.tuners.road.model import RoadModel as PeftRoadModel
from torch import Tensor, nn

from turnrow.errors import UserError
from turnrow.tuners._dense import dense_linear, features
from turnrow.tuners._experts import warn_of_untargeted_experts
from turnrow.tuners._mixed_batch import MixedBatchModel
from turnrow.tuners._quantized import is_linear
from turnrow.tuners._quantized_model import QuantizedModelMixin
from turnrow.tuners._targets import resolve_targets
from turnrow.tuners.road.layer import RoadLinear

__all__ = ["RoadModel"]


class RoadModel(MixedBatchModel, QuantizedModelMixin, PeftRoadModel):
    """A model whose target layers' outputs are rotated and scaled in pairs (RoAd).

    Made by `peft.get_peft_model(model, RoadConfig(...))`.
    """

    def _prepare_model(self, peft_config: RoadConfig, model: nn.Module) -> None:
        if not peft_config.inference_mode:
            warn_of_untargeted_experts(model, "RoAd turns the outputs of linear layers alone; RoCoFT trains experts")
        for name, module in resolve_targets(self, peft_config, model).items():
            if not is_linear(module):
                raise UserError(
                    f"target module {name!r} is a {type(module).__name__}; RoAd rotates the output of linear layers "
                    "(torch.nn.Linear, Conv1D, and those quantized by a package that peft knows)"
                )
            out_features, _ = features(module)
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
        if base is None or type(base.weight) in (Tensor, nn.Parameter):
            return RoadLinear(target, adapter_name, road_config, requantize=kwargs.get("get_apply_tensor_subclass"))
        return PeftRoadModel._create_new_module(road_config, adapter_name, target, **kwargs)


def _largest_group(out_features: int) -> int:
    """The largest even divisor up to 64, peft's default group size."""
    return max(g for g in range(2, min(out_features, 64) + 1, 2) if out_features % g == 0)
