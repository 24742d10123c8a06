"""Make peft know RoCoFT, give its RoAd our layers, and let both into its mixed models. Nothing else of peft changes, and
nowhere else is it done.

peft keeps its methods in tables keyed by members of the enum `PeftType`, and its `register_peft_method` accepts members
only. peft 0.20 also looks a config's type up in the list of members when it saves. So RoCoFT becomes a member.
"""

from __future__ import annotations

from typing import Any

import peft.mapping as tables
import peft.mixed_model
import peft.tuners.mixed
import peft.tuners.mixed.model
from peft.utils.peft_types import PeftType, register_peft_method

from turnrow.tuners.mixed_methods import MixedModel
from turnrow.tuners.road.config import RoadConfig
from turnrow.tuners.road.model import RoadModel
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.model import RocoftModel

__all__ = ["register"]


def register() -> None:
    """Register `ROCOFT` with peft and put our config and model behind `ROAD`. May be called again without harm."""
    if "ROCOFT" not in PeftType.__members__:
        _add_member("ROCOFT")
        register_peft_method(name="rocoft", config_cls=RocoftConfig, model_cls=RocoftModel)
    tables.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROAD] = RoadConfig
    tables.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ROAD] = RoadModel
    _let_into_mixed_models(PeftType("ROCOFT"), PeftType.ROAD)


def _let_into_mixed_models(*kinds: PeftType) -> None:
    """Put our mixed model in the place of peft's, and our methods into the lists that it asks."""
    model: Any = peft.tuners.mixed.model
    new = tuple(kind for kind in kinds if kind not in model.COMPATIBLE_TUNER_TYPES)
    model.COMPATIBLE_TUNER_TYPES += new
    peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = model.COMPATIBLE_TUNER_TYPES
    model.PREFIXES += [tables.PEFT_TYPE_TO_PREFIX_MAPPING[kind] for kind in new]
    tables.PEFT_TYPE_TO_MIXED_MODEL_MAPPING.update(dict.fromkeys(kinds, MixedModel))
    mixed_model: Any = peft.mixed_model
    mixed_model.MixedModel = MixedModel


def _add_member(name: str) -> None:
    """Add a member to the string enum `PeftType`, which the enum module offers no way for."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
