"""Data sets by name whose answer is a text: rows of the hub become those of LLM-Adapters, word for word."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import CATALOG, make_task, read_table

# A row in the hub's form, and what of it is ours: instruction, output, answer.
HUB_ROWS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "boolq": (
        {
            "question": "does ethanol take more energy make that produces",
            "answer": False,
            "passage": "All biomass goes through at least some of these steps...",
        },
        "Please answer the following question with true or false, question: does ethanol take more energy make that "
        "produces?\n\nAnswer format: true/false",
        "the correct answer is false",
        "false",
    ),
    "piqa": (
        {
            "goal": "dresser",
            "sol1": "replace drawer with bobby pin ",
            "sol2": "finish, woodgrain with  bobby pin ",
            "label": 1,
        },
        "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with bobby pin \n\n"
        "Solution2: finish, woodgrain with  bobby pin \n\nAnswer format: solution1/solution2",
        "the correct answer is solution2",
        "solution2",
    ),
    "social_i_qa": (
        {
            "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
            "question": "What does Tracy need to do before this?",
            "answerA": "make a new plan",
            "answerB": "Go home and see Riley",
            "answerC": "Find somewhere to go",
            "label": "3",
        },
        "Please choose the correct answer to the question: Tracy didn't go home that evening and resisted Riley's attacks. "
        "What does Tracy need to do before this?\n\nAnswer1: make a new plan Answer2: Go home and see Riley Answer3: Find "
        "somewhere to go\n\nAnswer format: answer1/answer2/answer3",
        "the correct answer is answer3",
        "answer3",
    ),
    "hellaswag": (
        {
            "ind": 24,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["sleeps.", "is ripping level tiles off.", "sings.", "starts pulling up roofing on a roof."],
            "source_id": "activitynet~v_-JhWjGDPHMY",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        },
        "Please choose the correct ending to complete the given sentence: Roof shingle removal: A man is sitting on a roof. "
        "he\n\nEnding1: sleeps. Ending2: is ripping level tiles off. Ending3: sings. Ending4: starts pulling up roofing on a "
        "roof.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "the correct answer is ending4",
        "ending4",
    ),
    "winogrande": (
        {
            "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was a much better surgeon "
        "than Maria so _ always got the easier cases.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2",
        "the correct answer is option2",
        "option2",
    ),
    "arc_easy": (
        {
            "id": "MCAS_2000_4_6",
            "question": "Which keeps mold spores out?",
            "choices": {"text": ["goggles", "mask", "gloves"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "Please choose the correct answer to the question: Which keeps mold spores out?\n\nAnswer1: goggles Answer2: mask "
        "Answer3: gloves\n\nAnswer format: answer1/answer2/answer3",
        "the correct answer is answer2",
        "answer2",
    ),
    "openbookqa": (
        {
            "id": "8-376",
            "question_stem": "There is most likely going to be fog around:",
            "choices": {"text": ["a marsh", "a tundra", "the plains", "a desert"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: There is most likely going to be fog around:\n\nAnswer1: a marsh "
        "Answer2: a tundra Answer3: the plains Answer4: a desert\n\nAnswer format: answer1/answer2/answer3/answer4",
        "the correct answer is answer1",
        "answer1",
    ),
    "gsm8k": (
        {"question": "What was the profit?", "answer": "It is 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70,000"},
        "What was the profit?",
        "It is 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70,000",
        "70000",
    ),
    "multiarith": (
        {"question": " Sam bought 13 books. How many?", "final_ans": "13"},
        "Sam bought 13 books. How many?",
        "",
        "13",
    ),
    "svamp": (
        {
            "ID": "chal-1",
            "Body": "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack",
            "Question": "How much do you have to pay to buy each pack?",
            "Equation": "( 76.0 - 25.0 )",
            "Answer": "51.0",
            "Type": "Subtraction",
        },
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack. How much do you have to pay to "
        "buy each pack?",
        "",
        "51.0",
    ),
    "mawps": (
        {
            "id": "mawps__1",
            "question": "A city has 1,200 people and 30 leave. How many stay?",
            "chain": "<gadget id='calculator'>1_200 - 30</gadget>",
            "result": "1_170",
            "result_float": 1170.0,
            "equation": "x = 1_200 - 30",
            "expression": "1_200 - 30",
        },
        "A city has 1,200 people and 30 leave. How many stay?",
        "",
        "1170",
    ),
    "aqua": (
        {
            "question": "What is the perimeter?",
            "options": ["A)60 m", "B) 61 m", "C)62 m", "D)63 m", "E)none (A)"],
            "rationale": "2(l + b) = 62 m\nAnswer: C\n",
            "correct": "C",
        },
        "What is the perimeter? Answer Choices: (A) 60 m (B) 61 m (C) 62 m (D) 63 m (E) none (A)",
        "2(l + b) = 62 m\nAnswer: C\nThe answer is (C).",
        "C",
    ),
    "mathqa": (
        {
            "Problem": "a shopkeeper sold an article . what profit ?",
            "Rationale": '"38 % answer : a"',
            "options": "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these",
            "correct": "a",
            "annotated_formula": "",
            "linear_formula": "",
            "category": "gain",
        },
        "a shopkeeper sold an article . what profit ? The options: A ) 38 , B ) 27.675 , C ) 30 , D ) data inadequate , E ) none "
        "of these",
        '"38 % answer : a"\nThe answer is (A).',
        "A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub_become_ours(name: str) -> None:
    theirs, instruction, output, answer = HUB_ROWS[name]
    ours = make_task(name).in_our_form(Dataset.from_list([theirs]))
    assert ours.to_list() == [{"instruction": instruction, "input": "", "output": output, "answer": answer}]


def test_a_truth_value_becomes_the_label_that_is_written() -> None:
    ours = make_task("boolq").in_our_form(Dataset.from_list([HUB_ROWS["boolq"][0]]))
    assert ours.features["answer"].dtype == "string"


@pytest.mark.parametrize("name", HUB_ROWS)
def test_converted_rows_are_learned_and_asked(name: str, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    theirs, instruction, _, answer = HUB_ROWS[name]
    task: Any = make_task(name)
    ours = task.in_our_form(Dataset.from_list([theirs]))
    task.fit(ours)
    (taught,) = task.encode(ours, closing_tokenizer, 2000, split="train")
    learned = closing_tokenizer.decode([label for label in taught["labels"] if label != -100])
    # What is learned, given back as a text, is right.
    encoded = task.encode(ours, closing_tokenizer, 2000, split="test")
    assert task.metrics([learned.removesuffix("</s>")], [0], encoded)["accuracy"] == 1
    assert answer in learned.replace(",", "")
    assert closing_tokenizer.decode(encoded[0]["input_ids"]).endswith(f"{instruction}\n\n### Response:\n")


def test_every_conversion_is_tested() -> None:
    converted = {
        name
        for name, entry in CATALOG.items()
        if entry.convert and entry.task["name"] in ("arithmetic", "multiple_choice")
    }
    assert converted == {*HUB_ROWS, "arc_challenge"}
    assert CATALOG["arc_challenge"].convert is CATALOG["arc_easy"].convert


@pytest.mark.parametrize(
    ("name", "blank"), [("hellaswag", {"label": ""}), ("piqa", {"label": -1}), ("winogrande", {"answer": ""})]
)
def test_rows_without_an_answer_can_be_asked_but_not_scored(
    name: str, blank: dict[str, Any], closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    task = make_task(name)
    ours = task.in_our_form(Dataset.from_list([{**HUB_ROWS[name][0], **blank}]))
    assert len(task.encode(ours, closing_tokenizer, 2000, split="predict")) == 1
    with pytest.raises(UserError, match="row 1: column 'answer' has no value"):
        task.encode(ours, closing_tokenizer, 2000, split="test")


def test_summaries_and_conversations_of_the_hub(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    article = Dataset.from_list([{"article": "A cat sat.", "highlights": "Cat sits .\nAll watch .", "id": "0"}])
    ours = make_task("cnn_dailymail").in_our_form(article)
    assert (ours[0]["document"], ours[0]["summary"]) == ("A cat sat.", "Cat sits .\nAll watch .")
    closing_tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    turns = [{"content": "hi", "role": "user"}, {"content": "hey", "role": "assistant"}]
    talk = Dataset.from_list(
        [{"prompt": "hi", "prompt_id": "0", "chosen": turns, "rejected": turns, "messages": turns}]
    )
    for options in ({}, {"messages": "chosen"}):
        (row,) = make_task("ultrafeedback", **options).encode(talk, closing_tokenizer, 100, split="train")
        assert closing_tokenizer.decode(row["input_ids"]) == "<user>hi</s><assistant>hey</s>"


# How the questions in LLM-Adapters' files come apart into the hub's columns, to be put together again.
def _apart(name: str, instruction: str, answer: str) -> dict[str, Any]:
    if name == "boolq":
        (question,) = re.fullmatch(
            r".*?, question: (.*)\?\n\nAnswer format: true/false", instruction, re.DOTALL
        ).groups()  # type: ignore[union-attr]
        return {"question": question, "answer": answer == "true", "passage": ""}
    if name == "winogrande":
        sentence, first, second = re.fullmatch(
            r".*?sentence: (.*)\n\nOption1: (.*) Option2: (.*) Answer format: .*", instruction, re.DOTALL
        ).groups()  # type: ignore[union-attr]
        return {"sentence": sentence, "option1": first, "option2": second, "answer": answer[-1]}
    question, listed = re.fullmatch(
        r".*?question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: .*", instruction, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    texts = re.split(r" Answer[2-5]: ", listed)
    if name == "social_i_qa":
        return {
            "context": question.partition(" ")[0],
            "question": question.partition(" ")[2],
            **{f"answer{letter}": text for letter, text in zip("ABC", texts, strict=True)},
            "label": answer[-1],
        }
    letters = "ABCDE"[: len(texts)]
    return {
        "question": question,
        "choices": {"text": texts, "label": [*letters]},
        "answerKey": letters[int(answer[-1]) - 1],
    }


@pytest.mark.parametrize("name", ["boolq", "arc_easy", "arc_challenge", "social_i_qa", "winogrande"])
def test_the_form_is_that_of_the_published_files(name: str, real_data: Callable[[str, str], Path]) -> None:
    convert = CATALOG[name].convert
    assert convert is not None
    rows = read_table(real_data(name, "test")).to_list()
    again = [convert(_apart(name, row["instruction"], row["answer"])) for row in rows]
    assert again == rows


@pytest.mark.parametrize(
    ("name", "folder"),
    [(name, name) for name in ("gsm8k", "mawps", "addsub", "singleeq", "aqua", "mathqa", "boolq", "arc_easy", "arc_challenge", "social_i_qa", "winogrande", "xsum")]
    + [("alpaca", "alpaca_2k")],
)  # fmt: skip
def test_local_files_have_the_form_of_the_entry(
    name: str, folder: str, closing_tokenizer: PreTrainedTokenizerFast, real_data: Callable[[str, str], Path]
) -> None:
    task = make_task(name)
    table = task.in_our_form(read_table(real_data(folder, "test")))
    # Every row has a gold answer that is one, and a question.
    rows = min(len(table), 20 if name == "xsum" else 100)
    assert len(task.encode(table.select(range(rows)), closing_tokenizer, 9000, split="test")) == rows


@pytest.mark.parametrize("name", ["gsm8k", "mawps", "boolq", "arc_easy", "arc_challenge", "xsum"])
def test_local_training_files_can_be_learned(
    name: str, closing_tokenizer: PreTrainedTokenizerFast, real_data: Callable[[str, str], Path]
) -> None:
    task = make_task(name)
    table = read_table(real_data(name, "train")).select(range(20 if name == "xsum" else 100))
    task.fit(table)
    assert len(task.encode(table, closing_tokenizer, 9000, split="train")) == len(table)
