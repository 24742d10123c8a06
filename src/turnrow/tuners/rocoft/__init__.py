"""RoCoFT as a peft method: train r rows or columns of each weight matrix, in place."""

from __future__ import annotations

from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.layer import RocoftBias, RocoftLayer, RocoftLinear
from turnrow.tuners.rocoft.model import RocoftModel

__all__ = ["RocoftBias", "RocoftConfig", "RocoftLayer", "RocoftLinear", "RocoftModel"]
