"""Hooks that apply to every token what its own adapter brings."""

from __future__ import annotations

import pytest
import torch

from tests.serving.serving_models import model_of, prompt_of
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
