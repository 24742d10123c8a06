"""Bytes of an optimizer's state, found by taking one step of it on the meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from turnrow.training.live_bytes import LiveBytes

__all__ = ["OptimizerBytes", "optimizer_bytes"]


class OptimizerBytes(NamedTuple):
    """What an optimizer takes on top of parameters and gradients."""

    state: int
    """Kept from the first update on."""
    update: int
    """Needed for a moment, while it updates."""


# How many states of the size of a parameter bitsandbytes keeps in 8 bits.
_EIGHT_BIT_STATES = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}
# bitsandbytes keeps one float32 scale a block, and the states of small parameters in float32.
_BLOCK = 256
_SMALLEST_8_BIT = 4096


def optimizer_bytes(
    args: TrainingArguments, parameters: Sequence[nn.Parameter], device: torch.device
) -> OptimizerBytes | None:
    """Bytes of the optimizer that `args` chooses, for `parameters`; None if they cannot be told.

    Args:
        args: of which ``optim``, ``optim_args`` and the optimizer's own settings count.
        parameters: those that are trained.
        device: where the run will be; on GPUs torch updates all parameters at once, which takes more memory.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name in _EIGHT_BIT_STATES:
        return OptimizerBytes(sum(_eight_bit_state(p.numel()) * _EIGHT_BIT_STATES[name] for p in parameters), 0)
    copies = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    for copy in copies:
        copy.grad = torch.empty_like(copy)
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            return None
        fused = bool(settings.pop("fused", False))
        if optimizer_class.__module__.startswith("torch.optim"):
            settings["foreach"] = device.type == "cuda"
        with LiveBytes() as live:
            optimizer = optimizer_class(copies, **settings)
            optimizer.step()
    except (ImportError, ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError):
        # Not installed, or one that needs the model, the loss or values: transformers knows dozens.
        return None
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    state = sum(tensor.nbytes for tensor in tensors)
    # A fused kernel updates in place, element by element.
    return OptimizerBytes(state, 0 if fused else live.peak - state)


def _eight_bit_state(size: int) -> int:
    return size + 4 * math.ceil(size / _BLOCK) if size >= _SMALLEST_8_BIT else 4 * size
