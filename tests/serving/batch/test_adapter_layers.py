"""Hooks that apply to every token what its own adapter brings."""

from __future__ import annotations

import pytest
import torch

from tests.serving.serving_models import configurations, model_of, prompt_of, write_adapter
from turnrow.ops import packed
from turnrow.serving.batch.adapter_layers import AdapterLayers
from turnrow.serving.batch.packing import PackedStep, Segment
from turnrow.serving.batch.patches import Patch
from turnrow.serving.layers import served_layers
from turnrow.serving.store.reading import Reader

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("name", list(configurations("llama")))
def test_runs_of_tokens_are_given_what_single_tokens_are(name, tmp_path, monkeypatch):
    model = model_of("llama")
    layers, reader = AdapterLayers(served_layers(model), CPU), Reader(model, served_layers(model), torch.float32)
    for slot in (0, 1):
        folder = write_adapter("llama", configurations("llama")[name], tmp_path / str(slot), seed=slot)
        layers.put(slot, reader.read(folder))
    found = {}
    for shortest in (1, 100):
        monkeypatch.setitem(packed._SHORTEST_RUNS, "cpu", shortest)
        for slots in ((0, 1), (1, 0)):
            row = [Segment(slots[0], 2, True), Segment(None, 1, True), Segment(slots[1], 3, True)]
            found[shortest, slots] = forward(model, layers, PackedStep.of(row, CPU, head_sees_kept=False))
    for slots in ((0, 1), (1, 0)):
        torch.testing.assert_close(found[1, slots], found[100, slots], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1, (0, 1)], found[1, (1, 0)], rtol=1e-2, atol=1e-2)
