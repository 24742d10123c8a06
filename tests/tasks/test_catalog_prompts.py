"""The prompts of LM-BFF, and the rows of the hub that they are about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from turnrow.tasks import CATALOG, make_task, read_table
from turnrow.tasks.cloze import Cloze

# As written in run_experiment.sh of https://github.com/princeton-nlp/LM-BFF: special tokens and texts between asterisks, `_` for a
# blank, `-` for a text without its last letter, `l` for one that begins small.
LM_BFF = {
    "sst2": ("*cls**sent_0*_It_was*mask*.*sep+*", "terrible great"),
    "sst5": ("*cls**sent_0*_It_was*mask*.*sep+*", "terrible bad okay good great"),
    "mr": ("*cls**sent_0*_It_was*mask*.*sep+*", "terrible great"),
    "cr": ("*cls**sent_0*_It_was*mask*.*sep+*", "terrible great"),
    "mpqa": ("*cls**sent_0*_It_was*mask*.*sep+*", "terrible great"),
    "subj": ("*cls**sent_0*_This_is*mask*.*sep+*", "subjective objective"),
    "trec": ("*cls**mask*:*+sent_0**sep+*", "Expression Entity Description Human Location Number"),
    "mnli": ("*cls**sent-_0*?*mask*,*+sentl_1**sep+*", "Yes Maybe No"),
    "snli": ("*cls**sent-_0*?*mask*,*+sentl_1**sep+*", "Yes Maybe No"),
    "qnli": ("*cls**sent-_0*?*mask*,*+sentl_1**sep+*", "Yes No"),
    "rte": ("*cls**sent-_0*?*mask*,*+sentl_1**sep+*", "Yes No"),
    "mrpc": ("*cls**sent_0**mask*,*+sentl_1**sep+*", "No Yes"),
    "qqp": ("*cls**sent_0**mask*,*+sentl_1**sep+*", "No Yes"),
}  # fmt: skip


def written(template: str, texts: list[str]) -> str:
    """The text that LM-BFF would tokenize, with `<mask>` for its token."""
    pieces = []
    for piece in template.split("*"):
        kind, _, number = piece.rpartition("_")
        if kind.lstrip("+").startswith("sent"):
            text = texts[int(number)]
            text = text[:-1] if "-" in kind else text
            text = text[:1].lower() + text[1:] if "l" in kind else text
            pieces.append(" " * kind.startswith("+") + text)
        else:
            pieces.append({"cls": "", "sep+": "", "mask": "<mask>"}.get(piece, piece.replace("_", " ")))
    return "".join(pieces)


@pytest.mark.parametrize("name", LM_BFF)
def test_prompts_are_those_of_lm_bff(name: str) -> None:
    template, words = LM_BFF[name]
    task = make_task(f"{name}-prompt")
    assert list(task.label_words.values()) == words.split()  # type: ignore[attr-defined]
    assert list(task.label_words) == [str(n) for n in range(len(words.split()))]  # type: ignore[attr-defined]
    texts = ["The Cat sat on it.", "It drinks the Milk"]
    row = dict(zip(task.input_columns(), texts, strict=False))
    before, after = Cloze(task.template).fill(row)  # type: ignore[attr-defined]
    assert f"{before}<mask>{after}" == written(template, texts)
    assert task.main_metric == ("f1" if name in ("mrpc", "qqp") else "accuracy")


def test_every_prompted_set_of_the_paper_is_there() -> None:
    assert {name for name in CATALOG if name.endswith("-prompt")} == {f"{name}-prompt" for name in LM_BFF}


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("sst5", {"text": "fine", "label": 3, "label_text": "positive"}, {"sentence": "fine", "label": 3, "label_text": "positive"}),
        ("subj", {"text": "he ran", "label": 0, "label_text": "objective"}, {"sentence": "he ran", "label": 1}),
        (
            "trec",
            {"text": "how ?", "label": 0, "label_coarse": 0, "label_coarse_original": "DESC"},
            {"sentence": "how ?", "label": 2},
        ),
        ("snli", {"premise": "a", "hypothesis": "b", "label": 2}, {"sentence1": "a", "sentence2": "b", "label": 2}),
        ("mnli", {"premise": "a", "hypothesis": "b", "label": 2}, {"sentence1": "a", "sentence2": "b", "label": 2}),
        ("qnli", {"question": "a", "sentence": "b", "label": 1}, {"sentence1": "a", "sentence2": "b", "label": 1}),
        ("qqp", {"question1": "a", "question2": "b", "label": 1}, {"sentence1": "a", "sentence2": "b", "label": 1}),
        ("mpqa", {"sentence": "a", "label": 1}, {"sentence": "a", "label": 1}),
    ],
)  # fmt: skip
def test_rows_of_the_hub_become_ours(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    task = make_task(f"{name}-prompt")
    converted = task.in_our_form(Dataset.from_list([theirs]))
    assert converted[0] == ours
    assert task.in_our_form(converted)[0] == ours


def test_rows_without_a_label_are_left_out() -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, -1, 2)]
    assert make_task("snli-prompt").in_our_form(Dataset.from_list(rows))["label"][:] == [0, 2]


@pytest.mark.parametrize("name", ["sst2", "mr", "subj", "trec", "mnli", "qnli", "rte", "qqp"])
def test_local_files_have_words_for_their_classes(real_data: Callable[[str, str], Path], name: str) -> None:
    task = make_task(f"{name}-prompt")
    table = read_table(real_data(name, "test"))
    assert task.in_our_form(table) is table
    task.fit(table)


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_local_files_of_questions_have_the_form_of_the_entry(real_data: Callable[[str, str], Path], name: str) -> None:
    task = make_task(name)
    table = read_table(real_data("squad_v1" if name == "squad" else name, "validation"))
    assert task.in_our_form(table) is table
    task.fit(table)
    assert task.with_null == task.settles == (name == "squad_v2")  # type: ignore[attr-defined]


def test_images_of_the_hub_take_our_names() -> None:
    theirs = Dataset.from_dict({"img": [b"1"], "fine_label": [7], "coarse_label": [1]})
    assert make_task("cifar100").in_our_form(theirs)[0] == {"image": b"1", "label": 7, "coarse_label": 1}
    assert make_task("cifar10").in_our_form(theirs.rename_column("fine_label", "label"))[0]["image"] == b"1"
