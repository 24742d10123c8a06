"""A training step on tensors without values: what it would hold at each moment, without a byte of it.

torch's FakeTensor carries shape, dtype and device through every operator, autograd, autocast and checkpointing included, so
a step runs through the same code, the same kernels' choices and the same order of allocating and freeing as a real one.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from turnrow.training.live_bytes import LiveBytes
from turnrow.training.planning.grouped import GroupedProducts
from turnrow.tuners import rehearsal
from turnrow.tuners.road.layer import RoadLinear
from turnrow.tuners.rocoft.layer import RocoftLayer

__all__ = ["Walk", "quick_collections", "walk"]


@dataclass(frozen=True)
class Walk:
    """Bytes on top of the model's own, the optimizer's state left out."""

    saved: int
    """What the forward of a step leaves behind for its backward, once training is under way."""
    first_peak: int
    """The most at any moment of the first step."""
    later_peak: int
    """The most at any moment of a later step."""
    kept: int
    """What the layers hold from the first step on, such as the original rows; part of both peaks."""


def walk(
    model: nn.Module,
    make_inputs: Callable[[], Mapping[str, Tensor]],
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager],
    micro_steps: int = 1,
) -> Walk:
    """Take the first steps of training on fake tensors.

    Args:
        model: on the meta device, in training mode; it is not changed.
        make_inputs: gives one batch on `device`, with labels.
        device: where the run will be. Kernels, and with them what is saved, depend on it.
        precision: makes the context of the forward, such as ``torch.autocast``.
        micro_steps: forwards and backwards before an update (gradient accumulation).

    Raises:
        RuntimeError, NotImplementedError: the model looks at values, which are not here, or its kernels are not known to
            torch without values.
    """
    mode = FakeTensorMode()
    # The layers compare addresses to notice changes. All are 0 here, and nothing changes.
    with warnings.catch_warnings(), _without_tracebacks(), rehearsal(), mode, GroupedProducts():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        hollow, inputs = _hollow_copy(model, device), make_inputs()
        first = _step(hollow, inputs, precision, micro_steps)
        # RoAd finds out in its first backward pass whether it has to copy its outputs. No other layer changes its ways.
        learns = any(isinstance(module, RoadLinear) for module in hollow.modules())
        later = _step(hollow, inputs, precision, micro_steps) if learns else None
    if later is None:
        return Walk(first.saved, first.peak, first.peak, first.kept)
    return Walk(later.saved, first.peak, first.kept + later.peak, first.kept + later.kept)


@dataclass(frozen=True)
class _Step:
    saved: int
    peak: int
    kept: int


def _step(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    precision: Callable[[], AbstractContextManager],
    micro_steps: int,
) -> _Step:
    saved = 0
    with LiveBytes() as live:
        for module in model.modules():
            if isinstance(module, RocoftLayer):
                # Works out of the indices what it keeps at hand, as it does when a run moves the model.
                module.set_adapter(module.active_adapters)
        for number in range(min(micro_steps, 2)):
            with precision():
                loss = model(**inputs).loss
            if number == 0:
                gc.collect()
                saved = live.now
            loss.backward()
            del loss
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        return _Step(saved - live.now, live.peak, live.now)


@contextmanager
def quick_collections() -> Iterator[None]:
    """In this block garbage is looked for among what is made in it alone: of what the libraries brought that takes most of a plan's time."""
    if gc.get_freeze_count():  # someone else's, who would not have it back
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """torch logs the traceback of an operator that it does not know without values, and then raises the error as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _hollow_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a model on the meta device whose tensors claim to be on `device`; call it under FakeTensorMode."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_hollow(parameter, device), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _hollow(buffer, device)
    # Whatever else the layers hold is copied as it is.
    with unset_fake_temporarily():
        return copy.deepcopy(model, memo)


def _hollow(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
