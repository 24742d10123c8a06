"""Adapters small enough to check by eye, written by hand, and tiny models with random weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from turnrow.adapters import write_manifest

Golden = tuple[dict[str, Any], dict[str, Tensor]]


class TwoLayers(nn.Module):
    """The base of the golden adapters: weights `first` 4 x 6 and `second` 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 4)
        with torch.no_grad():
            self.first.weight.copy_(torch.arange(24.0).reshape(4, 6))
            self.second.weight.copy_(torch.arange(16.0).reshape(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture
def two_layers() -> TwoLayers:
    return TwoLayers()


@pytest.fixture
def golden_rows() -> Golden:
    """Rows 2 and 0 of `first`, row 1 of `second`."""
    config = {
        "peft_type": "ROCOFT",
        "r": 2,
        "mode": "row",
        "rank_pattern": {"second": 1},
        "target_modules": ["first", "second"],
        "bias": "none",
        "base_model_name_or_path": "two/layers",
    }
    tensors = {
        "base_model.model.first.rocoft_row": torch.arange(12.0).reshape(2, 6),
        "base_model.model.first.rocoft_row_index": torch.tensor([2, 0]),
        "base_model.model.second.rocoft_row": torch.tensor([[1.0, 2.0, 2.0, 4.0]]),
        "base_model.model.second.rocoft_row_index": torch.tensor([1]),
    }
    return config, tensors


@pytest.fixture
def golden_columns() -> Golden:
    """Columns 5 and 1 of `first`."""
    config = {"peft_type": "ROCOFT", "r": 2, "mode": "column", "target_modules": ["first"], "bias": "none"}
    tensors = {
        "base_model.model.first.rocoft_column": torch.arange(8.0).reshape(4, 2),
        "base_model.model.first.rocoft_column_index": torch.tensor([5, 1]),
    }
    return config, tensors


@pytest.fixture
def golden_road() -> Golden:
    """RoAd1 on `first`: the outputs (0, 1) and (2, 3) are turned as pairs."""
    config = {"peft_type": "ROAD", "variant": "road_1", "group_size": 2, "target_modules": ["first"]}
    tensors = {
        "base_model.model.first.road_theta": torch.tensor([0.3, 0.4]),
        "base_model.model.first.road_alpha": torch.tensor([1.0, 2.0]),
    }
    return config, tensors


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(config, tensors)`: the two files of an adapter in a new folder."""

    def write(config: dict[str, Any], tensors: dict[str, Tensor], name: str = "adapter") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture
def make_bert() -> Callable[..., BertForSequenceClassification]:
    def make(labels: int = 2, seed: int = 1) -> BertForSequenceClassification:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=labels, **sizes)).eval()

    return make


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    def make(seed: int = 2) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes)).eval()

    return make


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    def make(seed: int = 3) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **sizes)).eval()

    return make


@pytest.fixture
def train_a_little() -> Callable[[PreTrainedModel, PeftConfig], PeftModel]:
    """Put an adapter on a model and change its every trained value at random, as some training would."""

    def train(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
        adapted = get_peft_model(model, copy.deepcopy(config)).eval()  # peft writes into the config
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return adapted

    return train


@pytest.fixture
def save() -> Callable[..., Path]:
    """`save(model, folder)`: save an adapter as training does, with its manifest."""

    def save(model: PeftModel, folder: Path, *, manifest: bool = True, **provenance: Any) -> Path:
        # peft 0.20 would look for the base's own configuration under its empty name, and warn
        model.save_pretrained(str(folder), save_embedding_layers=False)
        if manifest:
            write_manifest(folder, model, **provenance)
        return folder

    return save


@pytest.fixture
def logits() -> Callable[[nn.Module], Tensor]:
    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(1, 9).reshape(2, 4)).logits

    return logits
