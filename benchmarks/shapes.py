"""Models of named sizes with random weights, built from their config: nothing is downloaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

__all__ = ["SHAPES", "Shape", "build_model", "model_config", "target_names"]

# Linear layers of the repeated blocks; embeddings, pooler and head stay out, for every method alike.
_BLOCK = re.compile(r"\.layers?\.\d+\.")


@dataclass(frozen=True)
class Shape:
    """The size of a model and of one step on it."""

    family: str
    """``llama`` (decoder, language-model head) or ``bert`` (encoder, classification head of 2 labels)."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    """1,000 in the small shapes, so that the head (which no method adapts) does not dominate the step."""
    tied_head: bool
    batch: int
    sequence: int
    dtype: str


SHAPES: dict[str, Shape] = {
    "tiny-llama": Shape("llama", 64, 192, 2, 4, 4, 50, False, 2, 16, "float32"),
    "tiny-bert": Shape("bert", 64, 192, 2, 4, 4, 50, False, 2, 16, "float32"),
    "llama": Shape("llama", 512, 1344, 6, 8, 8, 1_000, False, 4, 256, "float32"),
    "llama-1024": Shape("llama", 1024, 2752, 2, 16, 16, 1_000, False, 4, 256, "float32"),
    "bert": Shape("bert", 512, 2048, 6, 8, 8, 1_000, False, 8, 128, "float32"),
    "llama-3.2-3b": Shape("llama", 3072, 8192, 28, 24, 8, 128_256, True, 1, 1024, "bfloat16"),
    "llama-2-7b": Shape("llama", 4096, 11008, 32, 32, 32, 32_000, False, 1, 1024, "bfloat16"),
}


def model_config(shape: Shape) -> BertConfig | LlamaConfig:
    """Return the config of the model of `shape`; BERT's without dropout, so that every method computes the same loss."""
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
    }
    if shape.family == "llama":
        return LlamaConfig(
            **sizes, num_key_value_heads=shape.key_value_heads, tie_word_embeddings=shape.tied_head, use_cache=False
        )
    return BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def build_model(shape: Shape, *, device: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Return the model of `shape` in training mode with frozen random weights and no dropout.

    Dropout is off so that every method computes the same loss, which the benchmark checks before it times anything.
    """
    model_class = LlamaForCausalLM if shape.family == "llama" else BertForSequenceClassification
    torch.manual_seed(seed)
    with torch.device(device):
        model = model_class._from_config(model_config(shape), dtype=dtype)
    return model.train().requires_grad_(False)


def target_names(model: nn.Module) -> list[str]:
    """Return the full names of the linear layers that every method adapts: all those in the repeated blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _BLOCK.search(name)]
