"""turnrow: fine-tune transformers by training a few rows or columns of their weights (RoCoFT), or by turning pairs of their
activations (RoAd). A plug-in to peft: importing it makes `peft` know both.
"""

from __future__ import annotations

from turnrow.tuners import (
    ParameterCount,
    RoadConfig,
    RoadModel,
    RocoftConfig,
    RocoftModel,
    SwapGate,
    count_parameters,
    hotswap_adapter,
    register,
    select,
    swap_gate,
)

__version__ = "0.1.0"

__all__ = [
    "ParameterCount",
    "RoadConfig",
    "RoadModel",
    "RocoftConfig",
    "RocoftModel",
    "SwapGate",
    "__version__",
    "count_parameters",
    "hotswap_adapter",
    "select",
    "swap_gate",
]

register()
