"""The plug-ins to peft: the only room that touches peft's internals."""

from __future__ import annotations

from turnrow.tuners._dense import rehearsal
from turnrow.tuners._quantized_model import dequantize, keep_nf4_unpacked
from turnrow.tuners.counting import ParameterCount, count_parameters
from turnrow.tuners.gate import SwapGate
from turnrow.tuners.hotswap import hotswap_adapter
from turnrow.tuners.registration import register
from turnrow.tuners.road import RoadConfig, RoadModel
from turnrow.tuners.rocoft import RocoftConfig, RocoftModel, select
from turnrow.tuners.rocoft.reselection import check_reselection, move_optimizer_state, reselect, unite
from turnrow.tuners.swappable import swap_gate

__all__ = [
    "ParameterCount",
    "RoadConfig",
    "RoadModel",
    "RocoftConfig",
    "RocoftModel",
    "SwapGate",
    "check_reselection",
    "count_parameters",
    "dequantize",
    "hotswap_adapter",
    "keep_nf4_unpacked",
    "move_optimizer_state",
    "register",
    "rehearsal",
    "reselect",
    "select",
    "swap_gate",
    "unite",
]
