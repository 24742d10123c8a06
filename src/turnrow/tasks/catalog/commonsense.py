"""Commonsense reasoning: eight sets in the form of LLM-Adapters (Hu et al. 2023, EMNLP), and the mixture on which the papers train.

Each row of the hub becomes an instruction that names the labels, and an output that says which is right, word for word as there, so
that a model trained on the mixture knows the form. The papers score their test files: the hub's validation split of BoolQ, PIQA,
SIQA, HellaSwag and WinoGrande, whose test labels are not public, and the test split of ARC and OBQA. What is for validation is
the end of the training split where the test split is the hub's validation split.

The prompt is Alpaca's, as in LLM-Adapters and RoCoFT (Kowsher et al. 2025); Liao et al. (2024, RoAd), after Wu et al. (2024, ReFT), give the
instruction alone: ``prompt: "{instruction}\\n"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]

_ADAPTERS = "Hu et al. 2023, EMNLP (LLM-Adapters)"


def _labels(stem: str, count: int) -> list[str]:
    return [f"{stem}{number}" for number in range(1, count + 1)]


def _task(labels: list[str], **options: Any) -> dict[str, Any]:
    return {"name": "multiple_choice", "labels": labels, **options}


def _held_out(hub_id: str, rows: int) -> dict[str, str]:
    return {
        "train": f"{hub_id}:train[:-{rows}]",
        "validation": f"{hub_id}:train[-{rows}:]",
        "test": f"{hub_id}:validation",
    }


def _row(instruction: str, labels: Sequence[str], right: int | None) -> dict[str, Any]:
    """A row of LLM-Adapters; `right` is the number of the label from 0, None where the hub does not say."""
    answer = None if right is None else labels[right]
    output = "" if answer is None else f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def _number(label: str | int, first: int = 0) -> int | None:
    """The number of a label, of which the hub counts the first as `first`; None for its blanks and -1, of test splits."""
    return int(label) - first if str(label).strip() not in ("", "-1") else None


def _listed(stem: str, texts: Sequence[str]) -> str:
    return " ".join(f"{stem.capitalize()}{number}: {text}" for number, text in enumerate(texts, start=1))


def _question(question: str, answers: Sequence[str], right: int | None) -> dict[str, Any]:
    labels = _labels("answer", len(answers))
    return _row(
        f"Please choose the correct answer to the question: {question}\n\n{_listed('answer', answers)}\n\n"
        f"Answer format: {'/'.join(labels)}",
        labels,
        right,
    )


def _boolq(row: dict[str, Any]) -> dict[str, Any]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return _row(f"{question}\n\nAnswer format: true/false", ["false", "true"], int(row["answer"]))


def _piqa(row: dict[str, Any]) -> dict[str, Any]:
    return _row(
        f"Please choose the correct solution to the question: {row['goal']}\n\nSolution1: {row['sol1']}\n\n"
        f"Solution2: {row['sol2']}\n\nAnswer format: solution1/solution2",
        _labels("solution", 2),
        _number(row["label"]),
    )


def _social_i_qa(row: dict[str, Any]) -> dict[str, Any]:
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(f"{row['context']} {row['question']}", answers, _number(row["label"], 1))


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    return _row(
        f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}\n\n"
        f"{_listed('ending', row['endings'])}\n\nAnswer format: ending1/ending2/ending3/ending4",
        _labels("ending", 4),
        _number(row["label"]),
    )


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    return _row(
        f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}\n\n"
        f"{_listed('option', [row['option1'], row['option2']])} Answer format: option1/option2",
        _labels("option", 2),
        _number(row["answer"], 1),
    )


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    # The hub letters most answers A to E, and numbers some 1 to 5.
    return _question(row["question"], choices["text"], choices["label"].index(row["answerKey"].strip()))


def _openbookqa(row: dict[str, Any]) -> dict[str, Any]:
    return _arc({**row, "question": row["question_stem"]})


_ARC_READS = ("question", "choices", "answerKey")

ENTRIES = (
    Entry(
        name="boolq",
        title="BoolQ: is it true? A question that was asked to a search engine, without the passage that answers it",
        task=_task(["true", "false"]),
        hub=_held_out("google/boolq:", 900),
        reads=("question", "answer", "passage"),
        convert=_boolq,
        source=f"Clark et al. 2019, NAACL; prompt: {_ADAPTERS}",
    ),
    Entry(
        name="piqa",
        title="PIQA: which of two ways reaches a goal of everyday life?",
        task=_task(_labels("solution", 2)),
        hub=_held_out("baber/piqa:", 900),
        reads=("goal", "sol1", "sol2", "label"),
        convert=_piqa,
        source=f"Bisk et al. 2020, AAAI; prompt: {_ADAPTERS}",
    ),
    Entry(
        name="social_i_qa",
        title="SIQA: what do people feel, want or do next, of three?",
        task=_task(_labels("answer", 3)),
        hub=_held_out("lighteval/siqa:", 900),
        reads=("context", "question", "answerA", "answerB", "answerC", "label"),
        convert=_social_i_qa,
        source=f"Sap et al. 2019, EMNLP; prompt: {_ADAPTERS}",
    ),
    Entry(
        name="hellaswag",
        title="HellaSwag: how does the description go on, of four?",
        task=_task(_labels("ending", 4)),
        hub=_held_out("Rowan/hellaswag:", 900),
        reads=("activity_label", "ctx", "endings", "label"),
        convert=_hellaswag,
        source=f"Zellers et al. 2019, ACL; prompt: {_ADAPTERS}",
    ),
    Entry(
        name="winogrande",
        title="WinoGrande: which of two fills the blank?",
        task=_task(_labels("option", 2)),
        hub=_held_out("allenai/winogrande:winogrande_xl", 900),
        reads=("sentence", "option1", "option2", "answer"),
        convert=_winogrande,
        source=f"Sakaguchi et al. 2020, AAAI; prompt: {_ADAPTERS}",
        notes="The largest of the training splits, winogrande_xl.",
    ),
    Entry(
        name="arc_easy",
        title="ARC-e: questions of school science that simple methods answer",
        task=_task(_labels("answer", 5), offered=True),
        hub={split: f"allenai/ai2_arc:ARC-Easy:{split}" for split in ("train", "validation", "test")},
        reads=_ARC_READS,
        convert=_arc,
        source=f"Clark et al. 2018, arXiv:1803.05457; prompt: {_ADAPTERS}",
        notes="Most questions have four answers, some three or five.",
    ),
    Entry(
        name="arc_challenge",
        title="ARC-c: questions of school science that simple methods do not answer",
        task=_task(_labels("answer", 5), offered=True),
        hub={split: f"allenai/ai2_arc:ARC-Challenge:{split}" for split in ("train", "validation", "test")},
        reads=_ARC_READS,
        convert=_arc,
        source=f"Clark et al. 2018, arXiv:1803.05457; prompt: {_ADAPTERS}",
        notes="Most questions have four answers, some three or five.",
    ),
    Entry(
        name="openbookqa",
        title="OBQA: questions of science that take a fact and what everyone knows",
        task=_task(_labels("answer", 4)),
        hub={split: f"allenai/openbookqa:main:{split}" for split in ("train", "validation", "test")},
        reads=("question_stem", "choices", "answerKey"),
        convert=_openbookqa,
        source=f"Mihaylov et al. 2018, EMNLP; prompt: {_ADAPTERS}",
    ),
    Entry(
        name="commonsense_170k",
        title="Commonsense170K: the training splits of the eight sets, for a model that answers all",
        task=_task(
            [
                "true",
                "false",
                *_labels("solution", 2),
                *_labels("answer", 5),
                *_labels("ending", 4),
                *_labels("option", 2),
            ],
            offered=True,
        ),
        hub={"train": "zwhe99/commonsense_170k::train"},
        source=_ADAPTERS,
        notes="For training alone: data.test is to name a test file of LLM-Adapters, such as dataset/boolq/test.json.",
    ),
)
