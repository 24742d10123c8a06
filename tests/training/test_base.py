from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from turnrow.errors import UserError
from turnrow.tasks import Task, make_task, read_table
from turnrow.training.base import input_limit, load_base


@pytest.fixture
def task(films: Path) -> Task:
    task = make_task("classification", text="sentence", label="label")
    task.fit(read_table(str(films / "train.jsonl")))
    return task


def test_a_model_that_is_not_there_is_named(task: Task, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model '.*nowhere' cannot be loaded"):
        load_base(str(tmp_path / "nowhere"), task)


def test_the_new_head_is_reported_as_a_whole(tiny_base: Path, task: Task) -> None:
    assert load_base(str(tiny_base), task).new_modules == ("classifier",)


def test_a_head_for_other_labels_is_new(headed_base: Path, task: Task) -> None:
    base = load_base(str(headed_base), task)
    assert base.new_modules == ("classifier",)
    assert base.model.config.num_labels == 2


def test_the_head_of_a_half_precision_base_is_float32(tiny_base: Path, task: Task) -> None:
    base = load_base(str(tiny_base), task, dtype="bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in base.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("classifier")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("classifier")} == {torch.bfloat16}
    assert base.model(input_ids=torch.tensor([[2, 5, 3]])).logits.dtype == torch.float32


def test_input_is_cut_to_what_the_model_has_positions_for(tiny_base: Path, task: Task) -> None:
    base = load_base(str(tiny_base), task)
    assert base.tokenizer.model_max_length == 64
    assert input_limit(None, base) == 32
    assert input_limit(20, base) == 20
    with pytest.raises(UserError, match="max_length is 33, but the model has 32 positions"):
        input_limit(33, base)


def test_positions_of_roberta_start_after_the_padding_index(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, task: Task
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = RobertaConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=34, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tiny_tokenizer.save_pretrained(tmp_path / "roberta")
    assert input_limit(None, load_base(str(tmp_path / "roberta"), task)) == 32


def test_fields_of_the_config_can_be_changed_and_unknown_ones_are_refused(tiny_base: Path, films: Path) -> None:
    task = make_task("classification", text="sentence")
    task.fit(read_table(str(films / "train.jsonl")))
    base = load_base(str(tiny_base), task, model_config={"hidden_dropout_prob": 0.5})
    assert base.model.config.hidden_dropout_prob == 0.5
    assert {m.p for m in base.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5, 0.1}
    with pytest.raises(UserError, match="has no field 'hidden_dropout_probs'; did you mean 'hidden_dropout_prob'"):
        load_base(str(tiny_base), task, model_config={"hidden_dropout_probs": 0.5})


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, LlamaConfig])
def test_a_new_regression_head_starts_at_the_mean_of_the_labels(
    config: type[Any], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = AutoModel.from_config(config(vocab_size=len(tiny_tokenizer), **sizes))
    if hasattr(base, "pooler"):
        base.pooler = None  # is new, too, and no head
    base.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    task = make_task("regression", text=["sentence"], label="stars")
    task.fit(Dataset.from_dict({"sentence": ["a", "b"], "stars": [2.0, 4.0]}))
    model = load_base(str(tmp_path), task).model
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias") and p.shape == (1,)}
    assert len(biases) == (0 if config is LlamaConfig else 1)
    assert all(bias.item() == 3.0 for bias in biases.values())
    others = [p for name, p in model.named_parameters() if name.endswith("bias") and name not in biases]
    assert not any((bias == 3.0).any() for bias in others)


def test_a_regression_head_that_was_trained_keeps_its_bias(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    trained = BertForSequenceClassification(BertConfig(vocab_size=len(tiny_tokenizer), num_labels=1, **sizes))
    torch.nn.init.constant_(trained.classifier.bias, 7.0)
    trained.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    task = make_task("regression", text=["sentence"], label="stars")
    task.fit(Dataset.from_dict({"sentence": ["a", "b"], "stars": [2.0, 4.0]}))
    assert load_base(str(tmp_path), task).model.classifier.bias.item() == 7.0


@pytest.mark.parametrize(("task", "named"), [("gsm8k", "cls"), ("sst2-prompt", "cls")])
def test_what_a_language_model_lacks_is_named(tiny_base: Path, task: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"'.*base' has no weights for {named}, .*the task .* is for language models"):
        load_base(str(tiny_base), make_task(task))
    # An adapter holds what was trained with it.
    assert load_base(str(tiny_base), make_task("sst2-prompt"), adapted=True).new_modules == ("cls",)


def test_an_encoder_is_no_decoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for model in (
        BertForMaskedLM(BertConfig(vocab_size=99, **sizes)),
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=99, **sizes)),
    ):
        model.save_pretrained(tmp_path / model.config.model_type)
        tiny_tokenizer.save_pretrained(tmp_path / model.config.model_type)
    task = make_task("language_modelling")
    with pytest.raises(UserError, match=r"'.*bert' is no decoder: as BertLMHeadModel it reads .* {is_decoder: true}"):
        load_base(str(tmp_path / "bert"), task)
    assert load_base(str(tmp_path / "bert"), task, model_config={"is_decoder": True}).new_modules == ()
    # Its config says is_decoder: false too.
    assert load_base(str(tmp_path / "gpt_neox"), task).new_modules == ()
