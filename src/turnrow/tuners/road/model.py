"""The peft tuner of RoAd: peft's own, with our layer for linear modules and checks before anything is replaced."""

from __future__ import annotations

import copy
from typing import Any

from peft import RoadConfig as PeftRoadConfig
from peft.tuners.road.model import RoadModel as PeftRoadModel
from torch import Tensor, nn

from turnrow.errors import UserError
from turnrow.ops.subspace import of_module, subspace
from turnrow.tuners._dense import dense_linear, features
from turnrow.tuners._experts import warn_of_untargeted_experts
from turnrow.tuners._mixed_batch import MixedBatchModel
from turnrow.tuners._names import check_named
from turnrow.tuners._quantized import is_linear
from turnrow.tuners._quantized_model import QuantizedModelMixin
from turnrow.tuners._targets import resolve_targets
from turnrow.tuners.road.config import TRAINABLE, settings_of
from turnrow.tuners.road.layer import RoadLinear

__all__ = ["RoadModel"]


class RoadModel(MixedBatchModel, QuantizedModelMixin, PeftRoadModel):
    """A model whose target layers' outputs are rotated and scaled in pairs (RoAd).

    Made by `peft.get_peft_model(model, RoadConfig(...))`.
    """

    def _prepare_model(self, peft_config: PeftRoadConfig, model: nn.Module) -> None:
        if not peft_config.inference_mode:
            warn_of_untargeted_experts(model, "RoAd turns the outputs of linear layers alone; RoCoFT trains experts")
        targets = resolve_targets(self, peft_config, model)
        for name, module in targets.items():
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
        _check_blocks(peft_config, targets)

    def _create_and_replace(
        self,
        road_config: PeftRoadConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        blocks, _ = settings_of(road_config)
        if isinstance(blocks, dict):
            road_config = copy.copy(road_config)
            road_config.blocks = of_module(blocks, current_key)  # type: ignore[attr-defined]  # ours has them
        # not super(): a mixed model calls this with itself
        PeftRoadModel._create_and_replace(self, road_config, adapter_name, target, target_name, parent, current_key)

    @staticmethod
    def _create_new_module(
        road_config: PeftRoadConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base = dense_linear(target)
        if base is None or type(base.weight) in (Tensor, nn.Parameter):
            return RoadLinear(target, adapter_name, road_config, requantize=kwargs.get("get_apply_tensor_subclass"))
        blocks, trained = settings_of(road_config)
        if blocks is not None or len(trained) < len(TRAINABLE):
            raise UserError(
                f"a weight of type {type(base.weight).__name__} is left to peft's own layer of RoAd, which turns every pair and trains "
                "angles and scales: leave out blocks and train, or the module"
            )
        return PeftRoadModel._create_new_module(road_config, adapter_name, target, **kwargs)


def _check_blocks(config: PeftRoadConfig, targets: dict[str, nn.Module]) -> None:
    blocks, _ = settings_of(config)
    if blocks is None:
        return
    if isinstance(blocks, dict):
        check_named("blocks", blocks, targets)
    for name, module in targets.items():
        part = of_module(blocks, name)
        if part is not None:
            subspace(part, features(module)[0] // 2, where=f"blocks of module {name!r}", what="pairs")


def _largest_group(out_features: int) -> int:
    """The largest even divisor up to 64, peft's default group size."""
    return max(g for g in range(2, min(out_features, 64) + 1, 2) if out_features % g == 0)
