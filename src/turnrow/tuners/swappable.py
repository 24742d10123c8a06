"""What of a model a swap has to do with: the PeftModel, its tuner, the compiled ways into it, and its gate."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from turnrow.errors import UserError
from turnrow.tuners._mixed_batch import MixedBatchModel
from turnrow.tuners.gate import SwapGate

__all__ = ["peft_model_in", "swap_gate", "tuner_of", "ways_in"]


def swap_gate(model: nn.Module) -> SwapGate:
    """Put up the gate that keeps swaps and running calls of a model apart, or find the one that is up.

    From then on these hold it: every call of the PeftModel, every `generate` of it from beginning to end, and every call of
    what `torch.compile` made of it and was given to this function or to `SwapGate.guard`. Calls of a module inside the
    PeftModel do not: hold `with gate.running():` around them.

    Args:
        model: a PeftModel with RoCoFT or RoAd adapters; compiled in place (`model.compile()`) or what `torch.compile(model)` returned, if
            it is to be run so. Compile first, then put up the gate.

    Returns:
        The gate, the same for all ways into one model.

    Raises:
        UserError: `model` is of another kind.
    """
    ways, tuner = ways_in(model), tuner_of(peft_model_in(model))
    gate = tuner.swap_gate = tuner.swap_gate or SwapGate()
    for way in ways:
        gate.guard(way)
    return gate


def peft_model_in(model: nn.Module) -> PeftModel:
    """The PeftModel itself, in whatever `torch.compile` put around it; UserError if there is none."""
    given: Any = model
    while hasattr(given, "_orig_mod"):
        given = given._orig_mod
    if not isinstance(given, PeftModel):
        raise UserError(
            f"a swap needs a PeftModel, or what torch.compile returned for one; got {type(given).__name__}. If it lies inside, "
            "give the PeftModel itself"
        )
    return given


def tuner_of(model: PeftModel) -> MixedBatchModel:
    """Its RoCoFT or RoAd tuner; UserError if it is of another method."""
    tuner: Any = model.base_model
    if not isinstance(tuner, MixedBatchModel):
        raise UserError(
            f"only RoCoFT and RoAd adapters can be swapped here, and those of this model are of {type(tuner).__name__}; "
            "for LoRA there is peft.utils.hotswap.hotswap_adapter"
        )
    return tuner


def ways_in(model: nn.Module) -> list[nn.Module]:
    """The compiled modules around the PeftModel, and that itself if it is compiled in place."""
    way: Any = model
    found = []
    while hasattr(way, "_orig_mod"):
        found.append(way)
        way = way._orig_mod
    return found if way.__dict__.get("_compiled_call_impl") is None else [*found, way]
