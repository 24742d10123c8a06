"""A base so small that a run takes a second, and data from which it can learn something."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from turnrow.training import Recipe

from ..tasks.seeing import llava_processor

MakeRecipe = Callable[..., Recipe]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            # peft asks transformers a question under its old name.
            item.add_marker(
                pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
            )


@pytest.fixture(autouse=True, scope="session")
def _imported_modules_are_no_garbage() -> None:
    """accelerate collects garbage at the start of each run, which takes longer than the training of these models."""
    import turnrow.training.report
    import turnrow.training.run  # noqa: F401

    gc.collect()
    gc.freeze()


def tiny_config(vocabulary: int, **changes: Any) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertConfig(vocab_size=vocabulary, max_position_embeddings=32, pad_token_id=0, **sizes, **changes)


@pytest.fixture
def tiny_base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a BERT of two layers, without a head, and its tokenizer."""
    folder = tmp_path / "base"
    BertModel(tiny_config(len(tiny_tokenizer))).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def headed_base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Such a folder with a head for three labels."""
    folder = tmp_path / "headed"
    BertForSequenceClassification(tiny_config(len(tiny_tokenizer), num_labels=3)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def save_llava(folder: Path, positions: int = 64) -> str:
    """A tiny LLaVA with its processor, saved in `folder`."""
    processor = llava_processor()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=positions, bos_token_id=0, eos_token_id=1,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder with train, validation and test files: is the film good, and how good."""
    folder = tmp_path / "films"
    folder.mkdir()
    source = random.Random(0)
    for split, size in (("train", 24), ("validation", 6), ("test", 10)):
        rows = []
        for _ in range(size):
            word = source.choice(["good", "great", "happy", "bad", "awful", "sad"])
            label = int(word in ("good", "great", "happy"))
            other = " ".join(source.choices(["the", "a", "story", "man", "in", "home"], k=source.randint(1, 6)))
            rows.append(
                {"sentence": f"the film was {word} {other}", "label": label, "stars": label * 4 + source.random()}
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_base: Path, films: Path) -> MakeRecipe:
    """`make_recipe(method={"name": "lora"}, training={"max_steps": 2})`: a recipe that is small in every respect.

    `training` is merged into the defaults, everything else replaces them.
    """

    def make(**changes: Any) -> Recipe:
        training = {
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 3,
            "disable_tqdm": True,
            "use_cpu": True,
            **changes.pop("training", {}),
        }
        fields: dict[str, Any] = {
            "model": str(tiny_base),
            "task": {"name": "classification", "text": ["sentence"], "label": "label"},
            "data": {split: str(films / f"{split}.jsonl") for split in ("train", "validation", "test")},
            "method": {"name": "rocoft", "r": 2},
            "output_dir": str(tmp_path / "run"),
            **changes,
        }
        return Recipe(**fields, training=training)

    return make
