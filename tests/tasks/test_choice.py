"""Multiple choice: a label that is written, and labels that are weighed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from turnrow.errors import UserError
from turnrow.tasks import MultipleChoiceTask, make_task, read_table, task_from_dict

ANSWERS = ["answer1", "answer2", "answer3"]
ROWS = Dataset.from_list(
    [
        {"instruction": "Which? answer1: a answer2: b", "input": "", "output": "the correct answer is answer2", "answer": "answer2"},
        {"instruction": "And é?", "input": "", "output": "the correct answer is answer1", "answer": "answer1"},
        {"instruction": "answer1, answer2, answer3", "input": "", "output": "it is answer3", "answer": "answer3"},
    ]
)  # fmt: skip


def task(**options: Any) -> MultipleChoiceTask:
    made = make_task("multiple_choice", **{"labels": ANSWERS, "prompt": "{instruction}\n", **options})
    assert isinstance(made, MultipleChoiceTask)
    return made


def written(*texts: str) -> np.ndarray:
    return np.array(texts, dtype=object)


def test_the_label_that_is_named_counts_and_none_or_several_are_wrong() -> None:
    texts = written("the correct answer is answer2", "answer1 or answer2", "I do not know")
    scores = task().metrics(texts, np.zeros(3), ROWS)
    assert scores == {"accuracy": pytest.approx(1 / 3), "unparsable": pytest.approx(2 / 3)}
    assert task().decode(texts) == [
        {"prediction": "answer2", "unparsable": False, "generated": texts[0]},
        {"prediction": None, "unparsable": True, "generated": texts[1]},
        {"prediction": None, "unparsable": True, "generated": texts[2]},
    ]


def test_an_unparsable_text_is_never_taken_for_a_label() -> None:
    # As in evaluations in which what could not be read counted as 'true'.
    made = task(labels=["true", "false"])
    rows = Dataset.from_dict({"answer": ["true", "true", "false"]})
    assert made.metrics(written("", "true or false", "who knows"), np.zeros(3), rows) == {
        "accuracy": 0,
        "unparsable": 1,
    }


def test_truth_values_are_labels() -> None:
    made = task(labels=[True, False])
    assert made.known == ["true", "false"]
    rows = Dataset.from_dict({"answer": [True, False]})
    assert made.metrics(written("True.", "the correct answer is TRUE"), np.zeros(2), rows)["accuracy"] == 0.5


def test_labels_are_learned_from_the_training_split(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(labels=None)
    with pytest.raises(RuntimeError, match="call fit"):
        made.decode(written("answer1"))
    made.fit(ROWS)
    assert made.known == ANSWERS
    assert task_from_dict(json.loads(json.dumps(made.to_dict()))) == made
    other = Dataset.from_dict({"instruction": ["a", "b"], "answer": ["answer1", "answer4"]})
    with pytest.raises(
        UserError, match="split 'test', row 2: column 'answer' holds 'answer4', which is none of the labels 'answer1'"
    ):
        made.encode(other, closing_tokenizer, 200, split="test")


def test_named_labels_need_no_answers_in_the_training_split() -> None:
    task().fit(ROWS.remove_columns(["answer"]))
    with pytest.raises(UserError, match="split 'train' has no column 'answer'"):
        task(labels=None).fit(ROWS.remove_columns(["answer"]))


@pytest.mark.parametrize("bad", [None, "", " "])
@pytest.mark.parametrize("scoring", ["generation", "likelihood"])
def test_a_missing_label_is_refused_with_its_row(
    scoring: str, bad: str | None, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = Dataset.from_dict({"instruction": ["a", "b"], "answer": ["answer1", bad]})
    made = task(scoring=scoring)
    with pytest.raises(UserError, match="split 'test', row 2: column 'answer' (has no value|must hold a label)"):
        made.encode(data, closing_tokenizer, 200, split="test")
    assert len(made.encode(data, closing_tokenizer, 200, split="predict")) == (6 if scoring == "likelihood" else 2)


def test_each_choice_is_a_row_with_its_own_answer_after_the_same_prompt(
    closing_tokenizer: PreTrainedTokenizerFast,
) -> None:
    made = task(scoring="likelihood", choice="it is {label}")
    assert not made.generates("test")
    assert not made.generates("predict")
    encoded = made.encode(ROWS, closing_tokenizer, 200, split="test")
    assert encoded["example"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert encoded["choice"] == [0, 1, 2] * 3
    row = encoded[4]
    assert closing_tokenizer.decode(row["input_ids"]) == "<s>And é?\nit is answer2</s>"
    learned = [label for label in row["labels"] if label != -100]
    assert closing_tokenizer.decode(learned) == "it is answer2</s>"
    assert row["tokens"] == len(learned)
    # What is trained is the target, one row to an example.
    assert len(made.encode(ROWS, closing_tokenizer, 200, split="train")) == 3
    assert "answer" not in made.encode(ROWS, closing_tokenizer, 200, split="predict").column_names


def test_only_offered_labels_are_choices(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(scoring="likelihood", offered=True)
    encoded = made.encode(ROWS, closing_tokenizer, 200, split="test")
    # The second prompt names none, so all are.
    assert list(zip(encoded["example"], encoded["choice"], strict=True)) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    losses = np.array([2.0, 1.0, 3.0, 4.0, 5.0, 0.5, 0.6, 0.7])
    decoded = made.decode(losses, encoded)
    assert [row["prediction"] for row in decoded] == ["answer2", "answer1", "answer1"]
    # e^-1 / (e^-1 + e^-2)
    assert decoded[0]["probability"] == pytest.approx(0.7310585786)
    tokens = encoded["tokens"][0]  # of every choice
    assert made.metrics(losses, np.zeros(8), encoded) == {
        "accuracy": pytest.approx(2 / 3),
        "loss": pytest.approx((1.0 + 3.0 + 0.7) / (3 * tokens)),
    }


def test_without_a_right_choice_there_is_no_loss(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"instruction": ["answer1 or answer2?"], "answer": ["answer3"]})
    made = task(scoring="likelihood", offered=True)
    encoded = made.encode(data, closing_tokenizer, 200, split="test")
    assert made.metrics(np.array([1.0, 2.0]), np.zeros(2), encoded) == {"accuracy": 0.0}


def test_among_equals_the_first_label_wins(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(scoring="likelihood")
    encoded = made.encode(ROWS, closing_tokenizer, 200, split="predict")
    assert {row["prediction"] for row in made.decode(np.ones(9), encoded)} == {"answer1"}


def test_a_mean_does_not_hold_its_length_against_a_choice(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"instruction": ["a"], "answer": ["no"]})
    losses = np.array([2.2, 3.0])  # of 3 and 5 tokens, ends included
    chosen = {}
    for normalize in ("sum", "mean"):
        made = task(labels=["no", "yeah"], scoring="likelihood", choice="{label}", normalize=normalize)
        encoded = made.encode(data, closing_tokenizer, 200, split="test")
        assert encoded["tokens"] == [3, 5]
        chosen[normalize] = made.decode(losses, encoded)[0]["prediction"]
    assert chosen == {"sum": "no", "mean": "yeah"}


def _decoder() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)).eval()


def test_likelihoods_are_those_that_the_model_gives_one_by_one(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made, model = task(scoring="likelihood"), _decoder()
    encoded = made.encode(ROWS, closing_tokenizer, 200, split="test")
    batch = made.collator(closing_tokenizer)(list(encoded))
    with torch.no_grad():
        kept = made.reduce_logits(model(**batch).logits, batch["labels"])
        assert kept.shape == (9,)
        for row, loss in zip(encoded, kept, strict=True):
            ids = torch.tensor([row["input_ids"]])
            logs = model(input_ids=ids).logits.log_softmax(-1)[0]
            start = len(row["input_ids"]) - row["tokens"]
            one = -sum(logs[place - 1, ids[0, place]] for place in range(start, ids.shape[1]))
            torch.testing.assert_close(loss, torch.as_tensor(one))


def test_the_loss_is_the_one_that_training_lowers(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made, model = task(scoring="likelihood"), _decoder()
    rows = ROWS.select(range(2))  # whose output is what a choice says
    kept, losses = {}, {}
    for split in ("train", "test"):  # the rows that are learned; all choices of each
        encoded = made.encode(rows, closing_tokenizer, 200, split=split)
        batch = made.collator(closing_tokenizer)(list(encoded))
        with torch.no_grad():
            output = model(**batch)
        kept[split], losses[split] = made.reduce_logits(output.logits, batch["labels"]).numpy(), output.loss.item()
    assert made.metrics(kept["test"], np.zeros(6), encoded)["loss"] == pytest.approx(losses["train"], rel=1e-5)


def test_an_encoder_decoder_weighs_choices_too(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=258, decoder_start_token_id=0, pad_token_id=1, **sizes))
    made = task(scoring="likelihood", architecture="encoder-decoder")
    (row, *_) = encoded = made.encode(ROWS, closing_tokenizer, 200, split="test")
    assert row["tokens"] == len(row["labels"])
    batch = made.collator(closing_tokenizer)(list(encoded))
    with torch.no_grad():
        output = model.eval()(**batch)
        kept = made.reduce_logits((output.logits, output.encoder_last_hidden_state), batch["labels"])
    mean = kept.sum() / (batch["labels"] != -100).sum()
    torch.testing.assert_close(mean, output.loss)


def test_the_prompt_is_cut_alike_for_all_choices(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"instruction": ["why?" * 30], "answer": ["no"]})
    made = task(labels=["no", "certainly"], scoring="likelihood", choice="{label}")
    encoded = made.encode(data, closing_tokenizer, 40, split="test")
    prompts = [row["input_ids"][: -row["tokens"]] for row in encoded]
    assert prompts[0] == prompts[1]
    assert len(encoded[1]["input_ids"]) == 40
    with pytest.raises(UserError, match="split 'test', row 1: a choice takes 10 tokens, and max_length is 10"):
        made.encode(data, closing_tokenizer, 10, split="test")


def test_a_diverged_model_is_reported(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(scoring="likelihood")
    encoded = made.encode(ROWS, closing_tokenizer, 200, split="test")
    with pytest.raises(UserError, match="1 of 9 choices have a loss that is not finite"):
        made.metrics(np.array([np.nan] + [1.0] * 8), np.zeros(9), encoded)


def test_an_empty_question_is_refused(tiny_decoder_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"instruction": [""], "answer": ["answer1"]})
    for scoring in ("generation", "likelihood"):
        with pytest.raises(UserError, match="row 1: the prompt is empty"):
            task(prompt="{instruction}", scoring=scoring).encode(data, tiny_decoder_tokenizer, 100, split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "likelyhood"}, "option 'scoring' must be one of 'generation', 'likelihood'.*did you mean"),
        ({"normalize": "max"}, "option 'normalize' must be one of 'sum', 'mean', got 'max'"),
        ({"labels": "true"}, r"option 'labels' must be a list such as \['true', 'false'\], got 'true'"),
        ({"labels": ["yes"]}, "option 'labels': a choice needs at least two labels.*got 'yes'"),
        ({"labels": ["a", "A"]}, "no two that differ only in case; got 'a', 'A'"),
        ({"labels": []}, "at least two labels.*got none"),
        ({"labels": ["a", " "]}, "none of them blank"),
        ({"choice": "{answer}"}, "option 'choice' must hold {label} and no other name"),
        ({"offered": "yes"}, "option 'offered' must be true or false"),
        ({"metric": "unparsable", "scoring": "likelihood"}, "metric 'unparsable' is for scoring 'generation'"),
        ({"gold": 3}, "option 'gold' must be the name of a column"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**options)


def test_a_broken_saved_task_is_refused() -> None:
    saved = task(labels=None).to_dict()
    with pytest.raises(UserError, match="'labels' must be a list of texts, got 3"):
        task_from_dict({**saved, "learned": {"labels": 3}})


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "boolq", "social_i_qa", "winogrande"])
def test_the_labels_that_a_real_prompt_names_are_those_of_its_answer_format(
    name: str, real_data: Callable[[str, str], Path]
) -> None:
    made = make_task(name, offered=True)
    assert isinstance(made, MultipleChoiceTask)
    for row in read_table(real_data(name, "test")):
        _, _, formats = row["instruction"].rpartition("Answer format: ")
        named = {made.known[number] for number in made._choices(row["instruction"])}
        assert named == {*formats.split("/")}
        assert row["answer"] in named
