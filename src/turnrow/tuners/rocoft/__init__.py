"""RoCoFT as a peft method: configuration, layers, model."""

from __future__ import annotations

from turnrow.tuners.rocoft.bias import RocoftBias
from turnrow.tuners.rocoft.calibration import select
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.experts import RocoftExperts, RocoftExpertWeight
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.rocoft.linear import RocoftLinear
from turnrow.tuners.rocoft.model import RocoftModel

__all__ = [
    "RocoftBias",
    "RocoftConfig",
    "RocoftExpertWeight",
    "RocoftExperts",
    "RocoftLayer",
    "RocoftLinear",
    "RocoftModel",
    "select",
]
