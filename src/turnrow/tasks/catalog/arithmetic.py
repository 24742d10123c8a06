"""Arithmetic word problems in the form of LLM-Adapters (Hu et al. 2023, EMNLP), and the mixture on which the papers train.

What is learned is a solution that ends in its answer, where the hub has solutions, and ``The answer is 8.`` where it has answers
alone. What is scored is the column `answer`, the gold one: the `output` in LLM-Adapters' test files was written by a model and is often
wrong. The prompt is Alpaca's, as there.
"""

from __future__ import annotations

import re
from typing import Any

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]

_ADAPTERS = "Hu et al. 2023, EMNLP (LLM-Adapters)"
_SOLVED = {"name": "arithmetic"}
_ANSWERED = {"name": "arithmetic", "target": "The answer is {answer}."}
_OPTIONS = {"name": "arithmetic", "answer": "letter"}


def _row(instruction: str, output: str, answer: str) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def _gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    # The hub's `answer` is the solution, with the answer behind ####.
    _, _, answer = row["answer"].rpartition("####")
    return _row(row["question"], row["answer"], answer.strip().replace(",", ""))


def _multiarith(row: dict[str, Any]) -> dict[str, Any]:
    return _row(row["question"].strip(), "", str(row["final_ans"]))


def _svamp(row: dict[str, Any]) -> dict[str, Any]:
    body = row["Body"].strip()
    return _row(
        body + ("" if body.endswith((".", "?", "!")) else ".") + f" {row['Question'].strip()}", "", str(row["Answer"])
    )


def _mawps(row: dict[str, Any]) -> dict[str, Any]:
    # Calc-X groups digits by underscores.
    return _row(row["question"].strip(), "", str(row["result"]).replace("_", ""))


def _aqua(row: dict[str, Any]) -> dict[str, Any]:
    options = " ".join(re.sub(r"^\s*([A-E])\s*\)\s*", r"(\1) ", option) for option in row["options"])
    return _row(
        f"{row['question']} Answer Choices: {options}",
        f"{row['rationale'].strip()}\nThe answer is ({row['correct']}).",
        row["correct"],
    )


def _mathqa(row: dict[str, Any]) -> dict[str, Any]:
    options = re.sub(r"(^|, )([a-e]) \)", lambda found: f"{found[1]}{found[2].upper()} )", row["options"].strip())
    letter = row["correct"].strip().upper()
    return _row(
        f"{row['Problem']} The options: {options}", f"{row['Rationale'].strip()}\nThe answer is ({letter}).", letter
    )


ENTRIES = (
    Entry(
        name="gsm8k",
        title="GSM8K: problems of several steps, with solutions",
        task=_SOLVED,
        hub={
            "train": "openai/gsm8k:main:train[:-300]",
            "validation": "openai/gsm8k:main:train[-300:]",
            "test": "openai/gsm8k:main:test",
        },
        reads=("question", "answer"),
        convert=_gsm8k,
        source="Cobbe et al. 2021, arXiv:2110.14168",
        notes="The last 300 training rows are for validation, as in Wu et al. (2024, ReFT).",
    ),
    Entry(
        name="multiarith",
        title="MultiArith: problems of several operations",
        task=_ANSWERED,
        hub={
            "train": "ChilleD/MultiArith::train[:-60]",
            "validation": "ChilleD/MultiArith::train[-60:]",
            "test": "ChilleD/MultiArith::test",
        },
        reads=("question", "final_ans"),
        convert=_multiarith,
        source="Roy, Roth 2015, EMNLP",
        notes="The hub divides its 600 problems at random; LLM-Adapters, and papers after it, test on all of them.",
    ),
    Entry(
        name="addsub",
        title="AddSub: problems of addition and subtraction",
        task=_ANSWERED,
        source=f"Hosseini et al. 2014, EMNLP; form: {_ADAPTERS}",
        notes="A test set alone, dataset/AddSub/test.json of LLM-Adapters. 111 of its problems are in singleeq too.",
    ),
    Entry(
        name="singleeq",
        title="SingleEq: problems of one equation",
        task=_ANSWERED,
        source=f"Koncel-Kedziorski et al. 2015, TACL; form: {_ADAPTERS}",
        notes="A test set alone, dataset/SingleEq/test.json of LLM-Adapters. 111 of its problems are in addsub too.",
    ),
    Entry(
        name="svamp",
        title="SVAMP: problems of one step, varied so that patterns of words mislead",
        task=_ANSWERED,
        hub={
            "train": "ChilleD/SVAMP::train[:-100]",
            "validation": "ChilleD/SVAMP::train[-100:]",
            "test": "ChilleD/SVAMP::test",
        },
        reads=("Body", "Question", "Answer"),
        convert=_svamp,
        source="Patel, Bhattamishra, Goyal 2021, NAACL",
        notes="The hub divides its 1,000 problems at random; LLM-Adapters, and papers after it, test on all of them.",
    ),
    Entry(
        name="aqua",
        title="AQuA: algebra, of five options",
        task=_OPTIONS,
        hub={split: f"deepmind/aqua_rat:raw:{split}" for split in ("train", "validation", "test")},
        reads=("question", "options", "rationale", "correct"),
        convert=_aqua,
        source=f"Ling et al. 2017, ACL; prompt: {_ADAPTERS}",
    ),
    Entry(
        name="mawps",
        title="MAWPS: a collection of older sets of problems",
        task=_ANSWERED,
        hub={split: f"MU-NLPC/Calc-mawps:default:{split}" for split in ("train", "validation", "test")},
        reads=("question", "chain", "result"),
        convert=_mawps,
        source="Koncel-Kedziorski et al. 2016, NAACL; hub: Kadlčík et al. 2023, EMNLP (Calc-X)",
        notes=(
            "Holds problems of multiarith, addsub and singleeq: do not train here and test there. The hub's split is not that of "
            "LLM-Adapters; near copies of its test rows were taken out of training."
        ),
    ),
    Entry(
        name="mathqa",
        title="MathQA: problems of entrance tests, of five options",
        task=_OPTIONS,
        hub={split: f"regisss/math_qa::{split}" for split in ("train", "validation", "test")},
        reads=("Problem", "Rationale", "options", "correct"),
        convert=_mathqa,
        source=f"Amini et al. 2019, NAACL; prompt: {_ADAPTERS}",
    ),
    Entry(
        name="math10k",
        title="Math10K: solutions of GSM8K, MAWPS and AQuA, for a model that answers all",
        task=_SOLVED,
        hub={"train": "lmms-lab/Math10K::train"},
        source=_ADAPTERS,
        notes=(
            "For training alone: data.test is to name a test file of LLM-Adapters, such as dataset/SVAMP/test.json. The solutions "
            "were written by a model. AQuA is scored by letters: task: {name: math10k, answer: letter}."
        ),
    ),
)
