"""What the model is asked never holds what its answer is scored against: every kind of task, and the real data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import TASKS, GenerationTask, make_task, read_table

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = {"instruction": "How many crayons?", "input": "Mary has some.", "document": "A cat sat on a mat."}
# Each kind with a row whose answers stand nowhere else, and with other answers to it.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "arithmetic": ({}, {"output": "QZ1 #### 987", "answer": "987"}, {"output": "QZ2 #### 654", "answer": "654"}),
    "arithmetic-chat": ({"chat": True}, {"output": "QZ1", "answer": "987"}, {"output": "QZ2", "answer": "654"}),
    "multiple_choice": (
        {"labels": ["qz1", "qz2"]},
        {"output": "the correct answer is qz1", "answer": "qz1"},
        {"output": "the correct answer is qz2", "answer": "qz2"},
    ),
    "summarization": ({}, {"summary": "QZ1 sat"}, {"summary": "QZ2 sat"}),
    "instruction": ({}, {"output": "QZ1"}, {"output": "QZ2"}),
    "instruction-messages": (
        {"messages": "messages"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "QZ1"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "QZ2"}]},
    ),
}


def test_no_kind_is_left_out() -> None:
    generative = {name for name, task in TASKS.items() if issubclass(task, GenerationTask)}
    assert generative == {kind.partition("-")[0] for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        (kind, split)
        for kind in KINDS
        # Labelled instructions are scored by the likelihood of their answers, which the model must see for that.
        for split in (["predict"] if kind.startswith("instruction") else ["validation", "test", "predict"])
    ],
)
def test_prompts_do_not_change_with_the_answers(
    kind: str, split: str, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    options, answers, others = KINDS[kind]
    closing_tokenizer.chat_template = CHAT
    task: Any = make_task(kind.partition("-")[0], generation={"max_new_tokens": 8}, **options)
    assert task.generates(split)
    asked, again = (
        task.encode(Dataset.from_list([{**ASKED, **given}]), closing_tokenizer, 600, split=split)
        for given in (answers, others)
    )
    assert asked["input_ids"] == again["input_ids"]
    assert asked["attention_mask"] == again["attention_mask"]
    prompt = closing_tokenizer.decode(asked[0]["input_ids"])
    assert "qz" not in prompt.lower()
    assert "987" not in prompt
    assert "labels" not in asked.column_names
    # What the collator hands to the model holds nothing else.
    assert set(task.collator(closing_tokenizer)([asked[0]])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("split", ["validation", "test", "predict"])
def test_choices_are_alike_whatever_is_right(split: str, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task("multiple_choice", labels=["qz1", "qz2"], scoring="likelihood")
    first, second = (
        task.encode(
            Dataset.from_list([{**ASKED, "output": f"it is {right}", "answer": right}]),
            closing_tokenizer,
            600,
            split=split,
        )
        for right in ("qz1", "qz2")
    )
    for column in ("input_ids", "labels", "example", "choice", "tokens"):
        assert first[column] == second[column]
    # The prompt, and as much of the answer as all choices share, is the same in both rows.
    asked, other = first["input_ids"]
    assert [place for place, (a, b) in enumerate(zip(asked, other, strict=True)) if a != b] == [len(asked) - 2]
    assert "qz" not in closing_tokenizer.decode(
        [t for t, label in zip(asked, first["labels"][0], strict=True) if label == -100]
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "messages" not in kind])
def test_a_prompt_that_names_the_answer_is_refused(kind: str) -> None:
    _, answers, _ = KINDS[kind]
    for column in answers:
        with pytest.raises(UserError, match=f"option 'prompt' names {column}, where the answer stands"):
            make_task(kind.partition("-")[0], prompt=f"{{instruction}} {{{column}}}")


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("gsm8k", "arithmetic", {}),
        ("mawps", "arithmetic", {}),
        ("addsub", "arithmetic", {}),
        ("singleeq", "arithmetic", {}),
        ("aqua", "arithmetic", {"answer": "letter"}),
        ("mathqa", "arithmetic", {"answer": "letter"}),
        ("boolq", "multiple_choice", {"labels": ["true", "false"]}),
        ("arc_easy", "multiple_choice", {"labels": [f"answer{n}" for n in range(1, 6)]}),
        ("arc_challenge", "multiple_choice", {"labels": [f"answer{n}" for n in range(1, 6)]}),
        ("social_i_qa", "multiple_choice", {"labels": [f"answer{n}" for n in range(1, 4)]}),
        ("winogrande", "multiple_choice", {"labels": ["option1", "option2"]}),
        ("xsum", "summarization", {}),
    ],
)
def test_prompts_of_real_data_do_not_change_with_the_answers(
    name: str,
    kind: str,
    options: dict[str, Any],
    closing_tokenizer: PreTrainedTokenizerFast,
    real_data: Callable[[str, str], Path],
) -> None:
    task: Any = make_task(kind, generation={"max_new_tokens": 8}, **options)
    rows = read_table(real_data(name, "test")).select(range(100))
    learned = [column for column in ("output", "answer", "summary") if column in rows.column_names]
    # Every row gets the answers of another.
    moved = Dataset.from_dict({**rows.to_dict(), **{c: [*rows[c][1:], rows[c][0]] for c in learned}})
    assert any(moved[column] != rows[column] for column in learned)
    asked, again = (task.encode(data, closing_tokenizer, 50_000, split="test")["input_ids"] for data in (rows, moved))
    assert asked == again
    # Nothing but the question and the words of the template is in it.
    questions = rows["document" if kind == "summarization" else "instruction"]
    words = {closing_tokenizer.decode(ids).replace(q, "", 1) for ids, q in zip(asked, questions, strict=True)}
    assert len(words) == 1
