"""A run of every kind of task whose answer is a text: what was learned is what evaluate and predict say of the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow.cli.train import _show
from turnrow.errors import UserError
from turnrow.tasks import CATALOG
from turnrow.training import Recipe, evaluate_adapter, predict, train

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SUMS = [
    {"instruction": asked, "input": "", "output": f"{solved} #### {answer}", "answer": answer}
    for asked, solved, answer in (("one+one", "1+1", "2"), ("two+two", "2+2", "4"), ("-five", "0-5", "-5"))
]
CHOICES = [
    {"instruction": asked, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
    for asked, answer in (("is ice cold", "true"), ("is fire wet", "false"), ("is snow ä white", "true"))
]
NEWS = [
    {"document": "cats sat on mats", "summary": "cats sat"},
    {"document": "dogs ran home", "summary": "dogs ran"},
    {"document": "birds flew off", "summary": "birds flew"},
]
TALKS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    for asked, answer in (("hi", "hey"), ("bye", "so long"), ("who", "me"))
]
ASKED = {"prompt": "{instruction}:", "generation": {"max_new_tokens": 28}}
LIKELIHOOD = {
    "name": "multiple_choice",
    "prompt": "{instruction}:",
    "scoring": "likelihood",
    "labels": ["true", "false"],
}
KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "arithmetic": ({"name": "arithmetic", **ASKED}, SUMS),
    "choice by generation": ({"name": "multiple_choice", **ASKED}, CHOICES),
    "choice by likelihood": (LIKELIHOOD, CHOICES),
    "summarization": ({"name": "summarization", "prompt": "{document}:", "generation": {"max_new_tokens": 12}}, NEWS),
    "instruction": ({"name": "instruction", **ASKED}, SUMS),
    "instruction packed": ({"name": "instruction", "packing": True, **ASKED}, SUMS),
    "conversations": ({"name": "instruction", "messages": "messages", "generation": {"max_new_tokens": 10}}, TALKS),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama of one layer with random weights, and a tokenizer of bytes without pad token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=258, max_position_embeddings=96, bos_token_id=0, eos_token_id=1, **sizes)
    )
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def recipe(base: Path, task: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> Recipe:
    data = {}
    for split in ("train", "validation", "test"):
        file = base.parent / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows * (4 if split == "train" else 1)))
        data[split] = str(file)
    training = {
        "learning_rate": 1e-2,
        "num_train_epochs": 25,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "no",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes.pop("training", {}),
    }
    fields: dict[str, Any] = {"method": {"name": "full"}, "max_length": 80, **changes}
    return Recipe(
        model=str(base), task=task, data=data, training=training, output_dir=str(base.parent / "run"), **fields
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_is_what_evaluate_and_predict_say(kind: str, base: Path) -> None:
    task, rows = KINDS[kind]
    # Four packed examples are a row.
    batch = 1 if task.get("packing") else 4
    result = train(recipe(base, task, rows, training={"per_device_train_batch_size": batch}))
    before, after = result.metrics["before"], result.metrics["after"]
    if task["name"] == "instruction":
        assert after["perplexity"] < 2 < 50 < before["perplexity"]
    else:
        assert after[result.metrics["main_metric"]] == 1
        assert "unparsable" not in after or (before["unparsable"] > after["unparsable"] == 0)
    assert evaluate_adapter(result.adapter, str(base.parent / "test.jsonl"), quiet=True) == after
    kept = [json.loads(line) for line in result.folder.predictions.read_text().splitlines()]
    said = predict(result.adapter, str(base.parent / "test.jsonl"), quiet=True)
    assert len(kept) == len(said) == len(rows)
    if task["name"] != "instruction":
        # Word for word, for labelled rows and for rows without their answers.
        assert said == kept
        bare = [{name: row[name] for name in ("instruction", "document") if name in row} for row in rows]
        assert [row["prediction"] for row in predict(result.adapter, bare, quiet=True)] == [
            row["prediction"] for row in kept
        ]


def test_a_selection_by_data_and_an_evaluation_in_between(base: Path) -> None:
    method = {"name": "rocoft", "r": 4, "selection": "gradient"}
    for kind in ("choice by likelihood", "instruction packed"):
        task, rows = KINDS[kind]
        made = recipe(
            base,
            task,
            rows,
            method=method,
            training={
                "num_train_epochs": 2,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "load_best_model_at_end": True,
            },
        )
        result = train(made, overwrite=True)
        history = [json.loads(line) for line in result.folder.history.read_text().splitlines()]
        assert sum(f"eval_{result.metrics['main_metric']}" in entry for entry in history) == 2
        # Both splits hold the same rows: the curve's loss is that of the figures, and no mean over wrong choices.
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert min(abs(loss - result.metrics["after"]["loss"]) for loss in losses) < 1e-5
        assert evaluate_adapter(result.adapter, str(base.parent / "test.jsonl"), quiet=True) == result.metrics["after"]


def test_packing_makes_fewer_steps(base: Path) -> None:
    steps = {}
    for kind in ("instruction", "instruction packed"):
        task, rows = KINDS[kind]
        made = recipe(base, task, rows, training={"num_train_epochs": 1})
        steps[kind] = train(made, overwrite=True).metrics["steps"]
    # Twelve rows of some 20 tokens, of which four fit into 80; three rows to a step.
    assert steps == {"instruction": 4, "instruction packed": 1}


def test_a_data_set_by_name_is_trained_on_files(base: Path) -> None:
    made = recipe(
        base,
        {"name": "gsm8k", "prompt": "{instruction}:", "generation": {"max_new_tokens": 28}},
        [{"question": row["instruction"], "answer": row["output"]} for row in SUMS],
    )
    result = train(made)
    assert result.metrics["after"]["accuracy"] == 1
    assert CATALOG["gsm8k"].task["name"] == result.metrics["task"]


def test_answers_are_written_in_the_form_that_alpaca_eval_reads(base: Path) -> None:
    pandas = pytest.importorskip("pandas")
    task, rows = KINDS["instruction"]
    result = train(recipe(base, {**task, "generator": "tiny"}, rows))
    file = base.parent / "outputs.json"
    predict(result.adapter, [{"instruction": row["instruction"]} for row in rows], output=file, quiet=True)
    # As alpaca_eval.utils.load_or_convert_to_dataframe reads a file.
    frame = pandas.read_json(file)
    assert list(frame.columns) == ["instruction", "output", "generator"]
    assert frame.to_dict("records")[0] == {"instruction": "one+one", "output": "1+1 #### 2", "generator": "tiny"}


def test_a_prompt_is_answered_beyond_the_length_that_was_trained(base: Path) -> None:
    """`max_length` is for a prompt with its answer, and here no longer than an answer alone may be."""
    task = {"name": "instruction", "prompt": "{instruction}:", "generation": {"max_new_tokens": 40}}
    once = {"num_train_epochs": 1}
    adapter = train(recipe(base, task, SUMS, max_length=40, training=once)).adapter
    long = [{"instruction": "one" * 20}]
    assert [list(row) for row in predict(adapter, long, quiet=True)] == [["instruction", "output", "generator"]]
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "generate", lambda self, **given: asked.append(given["input_ids"]) or asked[0])
        predict(adapter, long, quiet=True)
    assert asked[0].shape[1] == 40


def test_an_answer_that_leaves_no_prompt_is_refused_before_training(base: Path) -> None:
    task = {"name": "instruction", "prompt": "{instruction}:", "generation": {"max_new_tokens": 96}}
    with pytest.raises(
        UserError, match=r"has 96 positions, .*max_new_tokens = 96 of them, .* prompt; lower max_new_tokens"
    ):
        train(recipe(base, task, SUMS))
    assert not (base.parent / "run").exists()


def test_a_perplexity_that_overflows_is_written_as_null(base: Path) -> None:
    task = {"name": "instruction", "prompt": "{instruction}:", "generation": {"max_new_tokens": 4}}
    method = {"name": "lora", "r": 1, "target_modules": "all-linear"}
    made = recipe(base, task, SUMS, method=method, training={"max_steps": 1, "eval_strategy": "epoch"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("turnrow.tasks.likelihood.perplexity", lambda loss: float("inf"))
        result = train(made)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    folder = result.folder
    assert json.loads(folder.metrics.read_text(), parse_constant=refuse)["after"]["perplexity"] is None
    for line in (folder.history.read_text() + folder.predictions.read_text()).splitlines():
        json.loads(line, parse_constant=refuse)
    # As the command line does of a finished run.
    _show(train(made, resume=True))
