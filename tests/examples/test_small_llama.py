"""The script that made the small Llama makes one, goes on where it was, and the model that is kept is one that has learned."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.small_llama.pretrain import MODEL, pretrain


@pytest.fixture(scope="module")
def kept():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), tokenizer


def loss_of(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_the_script_trains_and_goes_on_with_what_is_there(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"text": f"It was the {number}th chapter of the story, and it rained."} for number in range(40)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = pretrain(data, tmp_path / "model", 4, bf16=False, work=tmp_path / "work")
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    assert first["after"]["perplexity"] < first["before"]["perplexity"]
    again = pretrain(data, tmp_path / "again", 4, bf16=False, work=tmp_path / "work")
    assert again["steps"] == first["steps"]
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights


def test_the_kept_model_prefers_english(kept):
    model, tokenizer = kept
    sentence = "She looked at him for a long time, and then went out of the room without a word."
    words = sentence.split()
    assert loss_of(model, tokenizer, sentence) < loss_of(model, tokenizer, " ".join(sorted(words))) - 0.5


def test_its_chat_template_ends_where_an_answer_begins(kept):
    text = kept[1].apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<s>### Instruction:\nHello\n\n### Response:\n"
