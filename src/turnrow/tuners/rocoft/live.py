"""The live weight: the weight of the base layer itself holds W0 + delta, and can be W0 again at any moment, bit for bit.

The weight goes live with the first forward and stays so until anything needs W0: disabling, switching, merging, deleting,
unloading, saving or loading a state dict, moving or casting the model. Then the kept values are put back, which restores
W0 bit for bit. They are on record before the weight is written, so an exception cannot lose them.

A quantized weight never goes live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turnrow.ops.delta import adapted
from turnrow.tuners._quantized import Requantizer
from turnrow.tuners._transition import one_at_a_time
from turnrow.tuners.rocoft.parts import Part
from turnrow.tuners.rocoft.tensors import Active, AdapterTensors

__all__ = ["Kept", "LiveLayer"]


@dataclass
class Kept:
    """Original values taken out of a weight or bias, so that they can be put back."""

    part: str
    """"row", "column", "entry", "bias", or "weight" for a whole weight that is quantized."""
    index: Tensor | None
    values: Any


@dataclass
class _Live:
    """What a live weight holds beside W0."""

    active: Active
    kept: list[Kept]
    index_stamps: list[tuple[int, int]]
    """State of the index tensors when the originals were taken out."""
    written: list[tuple[int, int]] = field(default_factory=list)
    """State of the parameters when the weight was last written."""
    pointer: int | None = None
    """Where the values of the weight lie; None before they were looked up."""
    values: Any = None
    """The weight as (out, in), to write to."""


class LiveLayer(AdapterTensors):
    """A layer that can put its adapters into the weight of its base layer, and take them out."""

    def __init__(self, base_layer: Any, adapter_name: str, requantize: Requantizer | None = None) -> None:
        super().__init__(base_layer, adapter_name, requantize)
        self.weight_is_shared = False
        """Set by the model where another module uses the same weight: then it must not change in place."""
        self._live: _Live | None = None

    def _go_live(self, active: Active) -> None:
        """Make the weight hold W0 + delta of the active adapter."""
        with one_at_a_time():
            self._go_live_alone(active)

    def _go_live_alone(self, active: Active) -> None:
        live: _Live | None = self._live
        index_stamps = [_stamp(part.index) for part in active.parts]
        if live is None or live.active is not active or live.index_stamps != index_stamps:
            self.restore_base()
            originals = [self._take_out(part) for part in active.parts]
            live = self._live = _Live(active, originals, index_stamps)
        pointer = self._base.weight.data_ptr()
        if live.pointer != pointer:
            live.values, live.pointer, live.written = self._values(), pointer, []
        written = [_stamp(part.parameter) for part in active.parts]
        # While it is trained the weight is written at every forward: `parameter.data` can change unseen by its version.
        if live.written != written or any(part.parameter.requires_grad for part in active.parts):
            with torch.no_grad():
                for part, kept in zip(active.parts, live.kept, strict=True):
                    part.ops.put_(live.values, kept.index, adapted(kept.values, part.delta()))
            live.written = written

    def restore_base(self) -> None:
        """Put the original values back if the weight is live. Bit-exact; merged adapters stay merged."""
        if self._live is None:
            return
        with one_at_a_time():
            live = self._live
            if live is not None:
                for kept in live.kept:
                    self._write(kept, kept.values)
                self._live = None

    def original_values(self) -> Tensor | None:
        """A copy of W0, (out, in) or (E, out, in), while the weight is live; None while the weight itself is W0.

        The weight stays as it is, so a forward may run meanwhile.
        """
        live = self._live
        if live is None:
            return None
        values = self._values().clone()
        for kept in live.kept:
            self._equations[kept.part].put_(values, kept.index, kept.values)
        return values

    def _adapters_change(self) -> None:
        self.restore_base()
        super()._adapters_change()

    def _take_out(self, part: Part) -> Kept:
        """A copy of what a part is about to replace."""
        if part.name == "bias":
            return Kept("bias", None, self._base.bias.detach().clone())
        return Kept(part.name, part.index.clone(), part.ops.keep(self._values(), part.index))

    def _write(self, kept: Kept, values: Tensor) -> None:
        with torch.no_grad():
            if kept.part == "bias":
                self._base.bias.data.copy_(values)
            else:
                self._equations[kept.part].put_(self._values(), kept.index, values)

    # --- between a forward and its backward ------------------------------------------------------------------------

    def _held(self) -> Active | None:
        """The adapters whose sum with W0 the weight holds now, or None for W0."""
        return None if self._live is None else self._live.active

    def _hold(self, held: Active | None) -> None:
        """Make the weight hold what it held in a forward pass, just before the base layer computes dx = dy W with it.

        Autograd cannot tell that it does not: the reference pass of a preference loss, for one, takes the adapter off between
        forward and backward. When the backward pass is through, the adapter is off again.
        """
        if self._held() is held or self.merged_adapters:
            return
        self.restore_base()
        if held is not None:
            self._go_live(held)
            torch.autograd.Variable._execution_engine.queue_callback(self.restore_base)

    def _held_for_backward(self, y: Tensor, x: Tensor) -> Tensor:
        """The base layer's output y, whose backward pass will find the weight as it is now."""
        if (
            y.requires_grad
            and x.requires_grad
            and not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is None
        ):
            held = self._held()
            y.register_hook(lambda dy: self._hold(held))
        return y


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it was written: changes whenever its values do, but for writes through `.data`."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
