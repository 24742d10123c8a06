"""Slots, tables, and the tokens of a step."""

from __future__ import annotations

import pytest
import torch

from tests.serving.serving_models import model_of, prompt_of
from turnrow.serving.batch.adapter_layers import AdapterLayers
from turnrow.serving.batch.packing import PackedStep, Segment
from turnrow.serving.batch.patches import Patch
from turnrow.serving.batch.slots import SlotTable
from turnrow.serving.batch.tables import Table
from turnrow.serving.layers import served_layers
from turnrow.serving.store.reading import Reader

CPU = torch.device("cpu")


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


def test_a_table_grows_and_keeps_what_it_holds():
    table = Table(CPU, ranked=True)
    table.put(0, torch.full((2, 3), 1.0))
    assert table.values is not None
    assert table.values.shape == (1, 2, 3)
    table.put(2, torch.full((3, 3), 2.0))
    assert table.values.shape == (4, 4, 3)
    assert table.values[0].tolist() == [[1] * 3, [1] * 3, [0] * 3, [0] * 3]
    table.put(2, torch.full((1, 3), 5.0))
    assert table.values[2].tolist() == [[5] * 3, [0] * 3, [0] * 3, [0] * 3]
    assert table.nbytes == 4 * 4 * 3 * 4


def test_a_step_like_the_one_before_is_the_one_before():
    segments = [Segment(0, 1, True), Segment(None, 1, True)]
    first = PackedStep.of(segments, CPU)
    assert PackedStep.of(list(segments), CPU, first) is first
    assert PackedStep.of([*segments, Segment(1, 4, False)], CPU, first) is not first


def test_the_head_is_told_of_last_tokens_alone_if_it_sees_no_others():
    segments = [Segment(0, 3, False), Segment(1, 2, True), Segment(None, 1, True), Segment(0, 1, True)]
    step = PackedStep.of(segments, CPU)
    assert (step.row.tokens, step.head.tokens) == (7, 3)
    both = step.head.of(frozenset({0, 1, 9}))
    assert both is not None
    assert both.tokens is not None
    assert both.tokens.tolist() == [0, 2]
    assert both.slots.tolist() == [1, 0]
    assert PackedStep.of(segments, CPU, head_sees_kept=False).head.tokens == 7


def test_layers_share_a_grouping_where_the_same_adapters_adapt_them():
    step = PackedStep.of([Segment(0, 1, True), Segment(1, 1, True)], CPU)
    assert step.row.of(frozenset({0, 1, 2})) is step.row.of(frozenset({0, 1, 5}))
    assert step.row.of(frozenset({7})) is None


def forward(model, step_of_layers: AdapterLayers | None, step: PackedStep | None) -> torch.Tensor:
    if step_of_layers is not None:
        step_of_layers.step = step
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt_of(6, 1)]), use_cache=False).logits


def test_base_requests_and_absent_methods_cost_no_arithmetic(adapters, monkeypatch):
    model = model_of("llama")
    plain = forward(model, None, None)
    layers = AdapterLayers(served_layers(model), CPU)
    reader = Reader(model, served_layers(model), torch.float32)
    for slot, name in enumerate(("rows", "road1", "lora")):
        layers.put(slot, reader.read(adapters("llama")[name]))
    applied: list[Patch] = []
    original = Patch.apply_
    monkeypatch.setattr(Patch, "apply_", lambda self, *args: (applied.append(self), original(self, *args)))
    base = PackedStep.of([Segment(None, 6, True)], CPU, head_sees_kept=False)
    assert torch.equal(forward(model, layers, base), plain)
    assert torch.equal(forward(model, layers, None), plain)
    assert applied == []
    turned = PackedStep.of([Segment(1, 6, True)], CPU, head_sees_kept=False)
    assert not torch.equal(forward(model, layers, turned), plain)
    assert {type(patch).__name__ for patch in applied} == {"_Rotation"}
    layers.drop(1)
    assert torch.equal(forward(model, layers, turned), plain)
    layers.close()
    assert layers.nbytes == 0


def test_a_slot_is_filled_anew_in_the_place_of_what_was_there(adapters):
    model, other = model_of("llama"), model_of("llama")
    reader = Reader(model, served_layers(model), torch.float32)
    used, fresh = AdapterLayers(served_layers(model), CPU), AdapterLayers(served_layers(other), CPU)
    step = PackedStep.of([Segment(0, 6, True)], CPU, head_sees_kept=False)
    for name in ("lora", "both", "road4", "rows", "rows-5"):
        used.put(0, reader.read(adapters("llama")[name]))
        forward(model, used, step)  # what it gathers for a step is kept for the next
    fresh.put(0, reader.read(adapters("llama")["rows-5"]))
    assert torch.equal(forward(model, used, step), forward(other, fresh, step))


def test_a_layer_given_other_tokens_than_the_step_has_says_so(adapters):
    model = model_of("llama")
    layers = AdapterLayers(served_layers(model), CPU)
    layers.put(0, Reader(model, served_layers(model), torch.float32).read(adapters("llama")["rows"]))
    with pytest.raises(RuntimeError, match=r"q_proj' was given 6 tokens in a step of 5"):
        forward(model, layers, PackedStep.of([Segment(0, 5, True)], CPU))
