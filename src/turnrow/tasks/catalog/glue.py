"""GLUE (Wang et al. 2019). The labels of its test splits are not public: its development splits are divided.

Half of a small development split, and 1,000 rows of a large one, are for validation, the rest is the test split; so Wu et al.
(2024, ReFT) and Liao et al. (2024, RoAd, section 4.1) do it.
"""

from __future__ import annotations

from typing import Any

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]

_GLUE = "Wang et al. 2019, ICLR (GLUE)"


def _splits(config: str, cut: str, development: str = "validation") -> dict[str, str]:
    return {
        "train": f"nyu-mll/glue:{config}:train",
        "validation": f"nyu-mll/glue:{config}:{development}[:{cut}]",
        "test": f"nyu-mll/glue:{config}:{development}[{cut}:]",
    }


def _one(metric: str = "accuracy") -> dict[str, Any]:
    return {"name": "classification", "text": ["sentence"], "label": "label", "metric": metric}


def _pair(metric: str = "accuracy") -> dict[str, Any]:
    return {"name": "classification", "text": ["sentence1", "sentence2"], "label": "label", "metric": metric}


ENTRIES = (
    Entry(
        name="cola",
        title="CoLA: is the sentence acceptable English?",
        task=_one("matthews_correlation"),
        hub=_splits("cola", "50%"),
        source=f"Warstadt, Singh, Bowman 2019, TACL; {_GLUE}",
    ),
    Entry(
        name="sst2",
        title="SST-2: is the sentence of a film review positive?",
        task=_one(),
        hub=_splits("sst2", "50%"),
        source=f"Socher et al. 2013, EMNLP; {_GLUE}",
        notes="GLUE's training split has phrases beside sentences.",
    ),
    Entry(
        name="mrpc",
        title="MRPC: do the sentences say the same?",
        task=_pair(),
        hub=_splits("mrpc", "50%"),
        source=f"Dolan, Brockett 2005, IWP; {_GLUE}",
        notes="f1 is reported beside accuracy.",
    ),
    Entry(
        name="qqp",
        title="QQP: do the questions ask the same?",
        task=_pair(),
        hub=_splits("qqp", "1000"),
        columns={"question1": "sentence1", "question2": "sentence2"},
        source=f"Iyer, Dandekar, Csernai 2017 (Quora Question Pairs); {_GLUE}",
        notes="f1 is reported beside accuracy.",
    ),
    Entry(
        name="stsb",
        title="STS-B: how similar are the sentences, from 0 to 5?",
        task={"name": "regression", "text": ["sentence1", "sentence2"], "label": "label"},
        hub=_splits("stsb", "50%"),
        source=f"Cer et al. 2017, SemEval; {_GLUE}",
    ),
    Entry(
        name="mnli",
        title="MNLI: does the first sentence entail or contradict the second? Genres of the training split",
        task=_pair(),
        hub=_splits("mnli", "1000", "validation_matched"),
        columns={"premise": "sentence1", "hypothesis": "sentence2"},
        source=f"Williams, Nangia, Bowman 2018, NAACL; {_GLUE}",
    ),
    Entry(
        name="mnli_mismatched",
        title="MNLI, other genres than those of the training split",
        task=_pair(),
        hub=_splits("mnli", "1000", "validation_mismatched"),
        columns={"premise": "sentence1", "hypothesis": "sentence2"},
        source=f"Williams, Nangia, Bowman 2018, NAACL; {_GLUE}",
    ),
    Entry(
        name="qnli",
        title="QNLI: does the sentence answer the question?",
        task=_pair(),
        hub=_splits("qnli", "1000"),
        columns={"question": "sentence1", "sentence": "sentence2"},
        source=f"Rajpurkar et al. 2016, EMNLP; {_GLUE}",
    ),
    Entry(
        name="rte",
        title="RTE: does the first sentence entail the second?",
        task=_pair(),
        hub=_splits("rte", "50%"),
        source=f"Dagan et al. 2005 and the later RTE rounds; {_GLUE}",
    ),
)
