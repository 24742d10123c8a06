"""Tiny language models, adapters of every kind for them, and what a request should come out as: alone, with the adapter merged."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import load_adapter, write_manifest

VOCABULARY = 300
_ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
_SOME = {"llama": ["q_proj", "down_proj"], "qwen2": ["v_proj", "up_proj"], "gpt2": ["c_attn"]}


@cache
def _model(architecture: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(5)
    if architecture == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=None, eos_token_id=None
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # random as they begin, they would say the same token again and again
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def model_of(architecture: str) -> Any:
    """A tiny model; the same weights every time."""
    return copy.deepcopy(_model(architecture))


def configurations(architecture: str) -> dict[str, PeftConfig]:
    """Every method, rank, variant and group size once."""
    every, some = _ALL[architecture], _SOME[architecture]
    stored = {"fan_in_fan_out": architecture == "gpt2"}  # as its weights are
    found: dict[str, PeftConfig] = {
        "rows": RocoftConfig(mode="row", r=2, target_modules=every),
        "rows-5": RocoftConfig(mode="row", r=5, target_modules=some, selection="random", selection_seed=1),
        "columns": RocoftConfig(mode="column", r=3, target_modules=every),
        "both": RocoftConfig(mode="row+column", r=2, target_modules=every, selection="random", selection_seed=2),
        "entries": RocoftConfig(mode="entry", density=0.05, target_modules=every, selection="random", selection_seed=3),
        "road1": RoadConfig(variant="road_1", group_size=2, target_modules=every),
        "road1-halves": RoadConfig(variant="road_1", group_size=8, target_modules=some),
        "road2": RoadConfig(variant="road_2", group_size=2, target_modules=every),
        "road4": RoadConfig(variant="road_4", group_size=4, target_modules=every),
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=every, **stored),
        "lora-rs": LoraConfig(
            r=6, lora_alpha=3, use_rslora=True, target_modules=every, rank_pattern={some[0]: 3}, alpha_pattern={some[0]: 5}, **stored
        ),
    }  # fmt: skip
    if architecture != "llama":  # which has no biases
        found["biased"] = RocoftConfig(mode="row", r=1, target_modules=every, bias="rocoft_only")
    return found


def write_adapter(architecture: str, config: PeftConfig, folder: Path, *, seed: int, size: float = 0.3) -> Path:
    """An adapter with random values, as training would have saved it."""
    model = get_peft_model(model_of(architecture), copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_manifest(folder, model)
    return folder


@cache
def merged(architecture: str, folder: Path | None) -> Any:
    """The model with the adapter merged into its weights."""
    model = model_of(architecture)
    return model if folder is None else load_adapter(model, folder).merge_and_unload().eval()


@torch.no_grad()
def alone(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """What `generate` makes of a prompt: the greedy tokens, and (tokens, vocabulary) log-probabilities."""
    ids = torch.tensor([prompt])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )[0]
    logits = model(whole[None]).logits[0, len(prompt) - 1 : -1]
    return whole[len(prompt) :].tolist(), logits.float().log_softmax(-1)


def prompt_of(length: int, seed: int) -> list[int]:
    """Random tokens."""
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
