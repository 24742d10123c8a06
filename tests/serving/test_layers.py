"""The layers that adapters can be served on."""

from __future__ import annotations

import pytest
from torch import nn

from tests.serving.serving_models import configurations, model_of
from turnrow.errors import UserError
from turnrow.serving.layers import served_layers


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_linear_layer_of_a_dense_model_is_served(architecture):
    model = model_of(architecture)
    layers = served_layers(model)
    kinds = {"llama": 7, "gpt2": 4}[architecture]
    assert len(layers) == 2 * kinds + 1
    assert [name for name, layer in layers.items() if layer.is_head] == ["lm_head"]
    name = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[architecture]
    assert (layers[name].out_features, layers[name].in_features) == {"llama": (24, 16), "gpt2": (64, 16)}[architecture]


def test_experts_are_not_served():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, num_local_experts=2,
    )  # fmt: skip
    names = set(served_layers(MixtralForCausalLM(config)))
    assert names == {*(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"), "lm_head"}


def test_a_model_with_an_adapter_of_its_own_is_refused():
    from peft import get_peft_model

    adapted = get_peft_model(model_of("llama"), configurations("llama")["rows"])
    with pytest.raises(UserError, match=r"has an adapter at '.*q_proj': give the plain base model"):
        served_layers(adapted)


def test_a_model_that_writes_no_texts_is_refused():
    with pytest.raises(UserError, match="LlamaModel has no output embeddings"):
        served_layers(model_of("llama").model)
    with pytest.raises(UserError, match="Linear has no output embeddings"):
        served_layers(nn.Linear(2, 2))
