"""A run whose test split the model answers: what it learned to write is what the files say, whoever asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from turnrow.errors import UserError
from turnrow.tasks import TASKS, GenerationTask, make_task
from turnrow.training import Recipe, evaluate_adapter, predict, train
from turnrow.training.generation import texts
from turnrow.training.trainer import predict_split


@dataclass(kw_only=True)
class Backwards(GenerationTask):
    """Write a word backwards."""

    name: ClassVar[str] = "backwards"
    metric_names: ClassVar[tuple[str, ...]] = ("exact_match",)
    prompt: str | list[str] = "say {word} backwards:"
    target: str = "{answer}"

    def gold_columns(self) -> list[str]:
        return ["answer"]

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        assert encoded is not None
        return {"exact_match": float(np.mean([p == g for p, g in zip(predictions, encoded["answer"], strict=True)]))}

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        return [{"prediction": text} for text in predictions]


@pytest.fixture(autouse=True)
def _known_task() -> Iterator[None]:
    TASKS["backwards"] = Backwards
    yield
    del TASKS["backwards"]


def byte_tokenizer(*, closes: bool = False) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = "$A </s>" if closes else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def decoder() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=258, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, **sizes)
    )


def encoder_decoder() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=258, decoder_start_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    )


@pytest.fixture
def words(tmp_path: Path) -> dict[str, str]:
    files = {}
    for split in ("train", "validation", "test"):
        rows = [{"word": word, "answer": word[::-1]} for word in ("cat", "bird", "cow", "fish")]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows * (4 if split == "train" else 1)))
        files[split] = str(path)
    return files


def recipe(folder: Path, model: torch.nn.Module, words: dict[str, str], **task: Any) -> Recipe:
    base = folder / "base"
    model.save_pretrained(base)  # type: ignore[operator]
    byte_tokenizer(closes=task.get("architecture") == "encoder-decoder").save_pretrained(base)
    return Recipe(
        model=str(base),
        task={"name": "backwards", "generation": {"max_new_tokens": 6}, **task},
        data=words,
        method={"name": "full"},
        training={
            "learning_rate": 1e-2,
            "num_train_epochs": 30,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "load_best_model_at_end": True,
            "disable_tqdm": True,
        },
        max_length=40,
        output_dir=str(folder / "run"),
    )


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_what_was_learned_is_written(architecture: str, tmp_path: Path, words: dict[str, str]) -> None:
    model = decoder() if architecture == "decoder" else encoder_decoder()
    result = train(recipe(tmp_path, model, words, architecture=architecture))
    assert result.metrics["before"] == {"exact_match": 0.0}
    assert result.metrics["after"] == {"exact_match": 1.0}
    kept = [json.loads(line) for line in result.folder.predictions.read_text().splitlines()]
    assert kept[1] == {"word": "bird", "answer": "drib", "prediction": "drib"}
    assert evaluate_adapter(result.adapter, words["test"], quiet=True) == result.metrics["after"]
    # A split that is called train where it comes from is asked like any other.
    assert evaluate_adapter(result.adapter, words["train"], split="train", quiet=True) == {"exact_match": 1.0}
    assert predict(result.adapter, [{"word": "cow"}], quiet=True) == [{"word": "cow", "prediction": "woc"}]
    history = [json.loads(line) for line in result.folder.history.read_text().splitlines()]
    assert history[-1].get("eval_exact_match", history[-2].get("eval_exact_match")) == 1.0


def test_an_answer_is_that_of_generate_alone() -> None:
    """In a batch of prompts of unequal length, padded, each row's answer is the one that it gets alone."""
    model, tokenizer, task = (
        decoder().eval(),
        byte_tokenizer(),
        make_task("backwards", generation={"max_new_tokens": 5}),
    )
    rows = Dataset.from_dict({"word": ["a", "abcdefgh", "abc"]})
    encoded = task.encode(rows, tokenizer, 40, split="predict")
    answers = predict_split(
        task, model, tokenizer, encoded, {"per_device_eval_batch_size": 3}, split="predict"
    ).predictions
    for ids, text in zip(encoded["input_ids"], answers, strict=True):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=1)
        assert text == tokenizer.decode(alone[0, len(ids) :], skip_special_tokens=True).strip()


def written(word: str, **generation: Any) -> str:
    """What a random model makes of a word."""
    task = make_task("backwards", generation={"max_new_tokens": 5, **generation})
    tokenizer = byte_tokenizer()
    encoded = task.encode(Dataset.from_dict({"word": [word]}), tokenizer, 40, split="predict")
    return str(predict_split(task, decoder().eval(), tokenizer, encoded, {}, split="predict").predictions[0])


def test_an_answer_ends_with_the_text_that_the_options_name() -> None:
    end = byte_tokenizer().convert_tokens_to_ids("a")
    others = [token for token in range(258) if token != end]
    assert written("b", suppress_tokens=others) == "aaaaa"
    assert written("b", suppress_tokens=others, stop_strings=["aa"]) == "aa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_words_ids": 3}, r"'bad_words_ids': 3}: `bad_words_ids` has to be a non-empty list, but is 3"),
        ({"forced_eos_token_id": "x"}, "'forced_eos_token_id': 'x'}: new"),
    ],
)
def test_what_the_model_refuses_is_an_error_of_the_user(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"the model cannot answer with task.generation: .*{message}"):
        written("b", **options)


def test_a_base_that_would_draw_at_random_is_greedy_here(tmp_path: Path, words: dict[str, str]) -> None:
    model = decoder()
    model.generation_config = GenerationConfig(do_sample=True, temperature=2.0, eos_token_id=[1, 7], bos_token_id=0)
    made = recipe(tmp_path, model, words)
    result = train(Recipe.from_dict({**made.to_dict(), "training": {"max_steps": 1, "disable_tqdm": True}}))
    kept = [json.loads(line)["prediction"] for line in result.folder.predictions.read_text().splitlines()]
    for _ in range(2):
        asked = [{"word": word} for word in ("cat", "bird", "cow", "fish")]
        assert [row["prediction"] for row in predict(result.adapter, asked, quiet=True)] == kept


def test_texts_end_where_rows_are_filled_up() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    (a, b) = (tokenizer("ab", add_special_tokens=False)["input_ids"],)[0]
    written = np.array([[a, b, 1, -100], [b, 1, -100, -100]])
    assert texts(written, tokenizer).tolist() == ["ab", "b"]
