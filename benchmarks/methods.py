"""The methods that are compared, each as a function from a frozen model to the model that trains with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast
from unittest.mock import patch

from torch import nn
from transformers import PreTrainedModel

from benchmarks.rocoft_reference import ReferenceColumns, ReferenceRows

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["LIMIT", "LORA_RANK", "METHODS", "RANK", "Method", "find_method", "sharing_copy", "with_road_of_peft"]

LIMIT = "frozen"
"""The yardstick: forward, and backward to the inputs, with no weight trained."""

RANK = 3
LORA_RANK = 8


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    title: str
    apply: Callable[[PreTrainedModel, list[str]], nn.Module]
    """Takes a frozen model, which it may change, and the names of the linear layers to adapt."""


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` whose frozen parameters lie in the same storage, so that all methods see one set of weights."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _frozen(model: PreTrainedModel, targets: list[str]) -> nn.Module:
    return model


def _full(model: PreTrainedModel, targets: list[str]) -> nn.Module:
    return model.requires_grad_(True)


def _lora(rank: int) -> Callable[[PreTrainedModel, list[str]], nn.Module]:
    def apply(model: PreTrainedModel, targets: list[str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))

    return apply


def with_road_of_peft(model: PreTrainedModel, config: PeftConfig, **keywords: Any) -> PeftModel:
    """`get_peft_model` with peft's own RoAd: importing turnrow gives peft's ROAD type another layer."""
    from peft import PeftType, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.road import RoadModel

    with patch.dict(PEFT_TYPE_TO_TUNER_MAPPING, {PeftType.ROAD: RoadModel}):
        adapted = get_peft_model(model, config, **keywords)
    if type(adapted.base_model) is not RoadModel:
        raise RuntimeError(f"expected peft's own RoadModel, got {type(adapted.base_model)}")
    return adapted


def _road_of_peft(model: PreTrainedModel, targets: list[str]) -> nn.Module:
    from peft import RoadConfig

    return with_road_of_peft(model, RoadConfig(variant="road_1", target_modules=targets))


def _reference(
    layer: type[ReferenceRows] | type[ReferenceColumns],
) -> Callable[[PreTrainedModel, list[str]], nn.Module]:
    def apply(model: PreTrainedModel, targets: list[str]) -> nn.Module:
        for name in targets:
            model.set_submodule(name, layer(cast(nn.Linear, model.get_submodule(name)), RANK))
        return model

    return apply


def _rocoft(mode: Literal["row", "column"], rank: int) -> Callable[[PreTrainedModel, list[str]], nn.Module]:
    def apply(model: PreTrainedModel, targets: list[str]) -> nn.Module:
        from peft import get_peft_model

        from turnrow import RocoftConfig

        return get_peft_model(model, RocoftConfig(r=rank, mode=mode, target_modules=targets))

    return apply


def _road(variant: str) -> Callable[[PreTrainedModel, list[str]], nn.Module]:
    def apply(model: PreTrainedModel, targets: list[str]) -> nn.Module:
        from peft import get_peft_model

        from turnrow import RoadConfig

        return get_peft_model(model, RoadConfig(variant=variant, target_modules=targets))

    return apply


METHODS: dict[str, Method] = {
    LIMIT: Method("the limit: frozen model", _frozen),
    "full": Method("full fine-tuning", _full),
    "lora": Method(f"LoRA r={LORA_RANK} (peft)", _lora(LORA_RANK)),
    "road_peft": Method("RoAd1 (peft)", _road_of_peft),
    "rocoft_reference_rows": Method(f"RoCoFT rows r={RANK}, paper's Algorithm 1", _reference(ReferenceRows)),
    "rocoft_reference_columns": Method(f"RoCoFT columns r={RANK}, paper's Algorithm 1", _reference(ReferenceColumns)),
    "rows": Method(f"**RoCoFT rows r={RANK}**", _rocoft("row", RANK)),
    "columns": Method(f"**RoCoFT columns r={RANK}**", _rocoft("column", RANK)),
    "road_1": Method("**RoAd1**", _road("road_1")),
    "road_2": Method("**RoAd2**", _road("road_2")),
    "road_4": Method("**RoAd4**", _road("road_4")),
}

_OF_RANK: dict[str, Callable[[int], Method]] = {
    "lora": lambda r: Method(f"LoRA r={r} (peft)", _lora(r)),
    "rows": lambda r: Method(f"RoCoFT rows r={r}", _rocoft("row", r)),
    "columns": lambda r: Method(f"RoCoFT columns r={r}", _rocoft("column", r)),
}


def find_method(name: str) -> Method:
    """The method of a name in `METHODS`, or of one with a rank of its own, such as ``"rows:64"``.

    Raises:
        ValueError: there is none.
    """
    kind, _, rank = name.partition(":")
    if rank.isdecimal() and int(rank) and kind in _OF_RANK:
        return _OF_RANK[kind](int(rank))
    if name not in METHODS:
        raise ValueError(
            f"{name!r} is none of {', '.join(METHODS)}, nor one of {', '.join(_OF_RANK)} with a rank, as 'rows:64'"
        )
    return METHODS[name]
