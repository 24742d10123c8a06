"""The slots of a step: which tokens of the packed row, and of the rows that the head sees, have which slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from turnrow.ops.packed import Grouping, group

__all__ = ["PackedStep", "Segment"]


@dataclass(frozen=True)
class Segment:
    """The tokens of one request in a step, which lie side by side."""

    slot: int | None
    """Of its adapter; None for the base model."""
    length: int
    has_logits: bool
    """The head sees its last token."""


class _Groupings:
    """Groupings of one row of tokens, made when a layer first asks for them."""

    def __init__(self, lengths: Sequence[int], slots: Sequence[int | None], device: torch.device) -> None:
        self.tokens = sum(lengths)
        self._lengths, self._slots, self._device = lengths, slots, device
        self._present = frozenset(slot for slot in slots if slot is not None)
        self._known: dict[frozenset[int], Grouping | None] = {}

    def of(self, slots: frozenset[int]) -> Grouping | None:
        """The tokens whose slots are among `slots`; None if there are none."""
        if slots not in self._known:
            wanted = slots & self._present
            same = self._known.get(wanted)
            if same is None and wanted:
                same = group(self._lengths, [slot if slot in wanted else None for slot in self._slots], self._device)
            # adapters that have a part at different layers still share one grouping where it is the same
            self._known[slots] = self._known[wanted] = same
        return self._known[slots]


@dataclass(frozen=True, eq=False)
class PackedStep:
    """What the layers are told of a step."""

    segments: tuple[Segment, ...]
    row: _Groupings = field(repr=False)
    head: _Groupings = field(repr=False)
    has_adapters: bool
    """Whether any token has one."""

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        device: torch.device,
        before: PackedStep | None = None,
        *,
        head_sees_kept: bool = True,
    ) -> PackedStep:
        """The step of these segments.

        Args:
            before: the step before; it is given back if nothing changed, as between most steps of decoding.
            head_sees_kept: the head is given the last tokens alone, in their order; otherwise the whole row.
        """
        if before is not None and before.segments == tuple(segments):
            return before
        slots = [segment.slot for segment in segments]
        row = _Groupings([segment.length for segment in segments], slots, device)
        head = row
        if head_sees_kept:
            last = [segment for segment in segments if segment.has_logits]
            head = _Groupings([1] * len(last), [segment.slot for segment in last], device)
        return cls(tuple(segments), row, head, any(slot is not None for slot in slots))
