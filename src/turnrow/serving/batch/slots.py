"""Which adapter lies in which slot of the device: a fixed number, the longest unused goes first, those in use never."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["SlotTable"]

Key = TypeVar("Key", bound=Hashable)


class SlotTable(Generic[Key]):
    """Slots 0 to `count` - 1 and what lies in them. Not thread-safe: it belongs to the thread that runs the model."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._slots: OrderedDict[Key, int] = OrderedDict()
        """Those that are filled; the longest unused come first."""
        self._pins: dict[Key, int] = {}

    def __len__(self) -> int:
        """How many are filled."""
        return len(self._slots)

    @property
    def pinned(self) -> int:
        """How many are in use."""
        return len(self._pins)

    def find(self, key: Key) -> int | None:
        """The slot of `key`, None if it has none."""
        return self._slots.get(key)

    def can_take(self) -> bool:
        """Whether a slot is free or can be freed."""
        return len(self._pins) < self.count

    def take(self, key: Key) -> tuple[int, Key | None]:
        """Give `key`, which has none, a slot: the slot, and what had to leave it."""
        if self._free:
            slot, left = self._free.pop(), None
        else:
            left = next(other for other in self._slots if other not in self._pins)
            slot = self._slots.pop(left)
        self._slots[key] = slot
        return slot, left

    def pin(self, key: Key) -> None:
        """Use a slot once more; it stays until it was unpinned as often."""
        self._pins[key] = self._pins.get(key, 0) + 1
        self._slots.move_to_end(key)

    def unpin(self, key: Key) -> None:
        """End one use."""
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def is_pinned(self, key: Key) -> bool:
        """Whether it is in use."""
        return key in self._pins

    def free(self, key: Key) -> int:
        """Empty the slot of `key`, which is not in use; return it."""
        slot = self._slots.pop(key)
        self._free.append(slot)
        return slot
