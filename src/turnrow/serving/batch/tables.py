"""Tensors with a place for every slot, which grow with what is put into them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Table"]


class Table:
    """Values of many adapters, (slots, *shape), on the device.

    It is as long as the highest slot in use asks for and, where adapters differ in rank, as wide as the largest: both grow by
    doubling, so that few adapters of a small rank take little memory. What is not filled is zero.
    """

    def __init__(self, device: torch.device, *, ranked: bool) -> None:
        self._device = device
        self._ranked = ranked
        """Whether the first dimension of the values is a rank, in which adapters may differ."""
        self.values: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return 0 if self.values is None else self.values.nbytes

    def put(self, slot: int, value: Tensor) -> None:
        """Put a value into a slot."""
        values = self._with_room(slot, value)
        place = values[slot]
        if self._ranked:
            place[: len(value)].copy_(value)
            place[len(value) :].zero_()
        else:
            place.copy_(value)

    def _with_room(self, slot: int, value: Tensor) -> Tensor:
        held = self.values
        shape = list(value.shape)
        if self._ranked:
            shape[0] = max(_power_of_two(len(value)), 0 if held is None else held.shape[1])
        slots = max(_power_of_two(slot + 1), 0 if held is None else len(held))
        if held is not None and list(held.shape) == [slots, *shape]:
            return held
        grown = torch.zeros(slots, *shape, dtype=value.dtype, device=self._device)
        if held is not None and self._ranked:
            grown[: len(held), : held.shape[1]].copy_(held)
        elif held is not None:
            grown[: len(held)].copy_(held)
        self.values = grown
        return grown


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
