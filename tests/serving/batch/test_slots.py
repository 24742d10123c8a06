"""Which adapter lies in which slot."""

from __future__ import annotations

from turnrow.serving.batch.slots import SlotTable


def test_the_longest_unused_slot_goes_and_never_one_in_use():
    slots: SlotTable[str] = SlotTable(3)
    for name in "abc":
        assert slots.take(name)[1] is None
        slots.pin(name)
    assert not slots.can_take()
    for name in "bca":
        slots.unpin(name)
    slots.pin("b")
    slots.unpin("b")  # so that b was used last, then c, and a the longest ago
    slots.pin("c")
    assert slots.can_take()
    slot, left = slots.take("d")
    assert left == "a"
    assert slots.find("a") is None
    assert slots.find("d") == slot
    assert slots.take("e")[1] == "b"
    assert slots.find("c") is not None
    slots.pin("c")
    slots.unpin("c")
    assert slots.is_pinned("c")
    slots.unpin("c")
    assert not slots.is_pinned("c")


def test_a_freed_slot_is_used_next():
    slots: SlotTable[str] = SlotTable(2)
    first, _ = slots.take("a")
    slots.take("b")
    assert slots.free("a") == first
    assert slots.take("c") == (first, None)
    assert len(slots) == 2
