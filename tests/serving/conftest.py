"""Models and adapters of the serving tests, made once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.serving.serving_models import VOCABULARY, configurations, model_of, write_adapter


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`adapters(architecture)`: folders of adapters of every kind, by name."""
    made: dict[str, dict[str, Path]] = {}

    def of(architecture: str) -> dict[str, Path]:
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            made[architecture] = {
                name: write_adapter(architecture, config, root / name, seed=seed)
                for seed, (name, config) in enumerate(configurations(architecture).items())
            }
        return made[architecture]

    return of


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Tokens are bytes in the manner of GPT-2, an end of sequence, and words without meaning up to the size of the models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet])}
    for number in range(len(vocabulary), VOCABULARY):
        vocabulary[f"w{number}"] = number
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<|end|>"])


@pytest.fixture
def llama() -> Any:
    return model_of("llama")


@pytest.fixture(scope="session")
def saved_model(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama on disk, with a tokenizer."""
    folder = tmp_path_factory.mktemp("replicas") / "model"
    model_of("llama").save_pretrained(folder)
    copy.deepcopy(byte_tokenizer).save_pretrained(folder)
    return folder
