"""RoAd as a peft method: peft's own type `ROAD`, its configuration and its files, with our layers."""

from __future__ import annotations

from turnrow.tuners.road.config import RoadConfig
from turnrow.tuners.road.layer import RoadLinear
from turnrow.tuners.road.model import RoadModel

__all__ = ["RoadConfig", "RoadLinear", "RoadModel"]
