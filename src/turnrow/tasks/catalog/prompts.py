"""Few-shot classification by prompts: the manual templates and label words of LM-BFF (Gao et al. 2021, ACL, table 1).

The words are those of the table. The templates are those of its code (https://github.com/princeton-nlp/LM-BFF, run_experiment.sh),
which say more: in a pair the first sentence loses its final mark where a question mark follows, and the second one its capital.
Like there, the test split is the whole test or development split, and training rows, with as many for validation, are drawn:
``data: {few_shot: {k: 16, seed: 13, validation: true}}``, with the seeds 13, 21, 42, 87 and 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from turnrow.tasks.catalog.entry import Entry
from turnrow.tasks.catalog.sentences import subj_row, trec_row

__all__ = ["ENTRIES"]

_LM_BFF = "Gao, Fisch, Chen 2021, ACL (LM-BFF)"

_SENTIMENT = "{sentence} It was {mask}."
_POLARITY = {0: "terrible", 1: "great"}
_INFERENCE = "{sentence1:open}? {mask}, {sentence2:lower}"
_ENTAILS = {0: "Yes", 1: "Maybe", 2: "No"}
_FOLLOWS = {0: "Yes", 1: "No"}
_PARAPHRASE = "{sentence1} {mask}, {sentence2:lower}"
_SAME = {0: "No", 1: "Yes"}


def _prompt(template: str, words: Mapping[int, str], metric: str = "accuracy") -> dict[str, Any]:
    return {"name": "prompt", "template": template, "label_words": words, "metric": metric}


def _glue(config: str, test: str = "validation") -> dict[str, str]:
    return {"train": f"nyu-mll/glue:{config}:train", "test": f"nyu-mll/glue:{config}:{test}"}


def _plain(name: str) -> dict[str, str]:
    return {"train": f"{name}::train", "test": f"{name}::test"}


def _snli_row(row: dict[str, Any]) -> dict[str, Any] | None:
    # Where the annotators did not agree there is no label, -1.
    if row["label"] == -1:
        return None
    return {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": row["label"]}


def _entry(
    name: str,
    title: str,
    task: Mapping[str, Any],
    hub: Mapping[str, str],
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    reads: tuple[str, ...] = (),
    convert: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    notes: str = "",
) -> Entry:
    return Entry(
        name=f"{name}-prompt",
        title=f"{title} By a prompt",
        task=task,
        hub=hub,
        columns=columns or {},
        reads=reads,
        convert=convert,
        source=f"{source}; {_LM_BFF}",
        notes=notes,
    )


_TEXT = {"text": "sentence"}

ENTRIES = (
    _entry(
        "sst2",
        "SST-2: is the sentence of a film review positive?",
        _prompt(_SENTIMENT, _POLARITY),
        _glue("sst2"),
        "Socher et al. 2013, EMNLP",
        notes="GLUE's training split has phrases beside sentences.",
    ),
    _entry(
        "sst5",
        "SST-5: how positive is the sentence of a film review, in five steps?",
        _prompt(_SENTIMENT, {0: "terrible", 1: "bad", 2: "okay", 3: "good", 4: "great"}),
        _plain("SetFit/sst5"),
        "Socher et al. 2013, EMNLP",
        columns=_TEXT,
    ),
    _entry(
        "mr",
        "MR: is the sentence of a film review positive?",
        _prompt(_SENTIMENT, _POLARITY),
        _plain("cornell-movie-review-data/rotten_tomatoes"),
        "Pang, Lee 2005, ACL",
        columns=_TEXT,
        notes="Another split than that of LM-BFF, which tests on 2,000 sentences.",
    ),
    _entry(
        "cr",
        "CR: is the sentence of a customer's review positive?",
        _prompt(_SENTIMENT, _POLARITY),
        _plain("SetFit/CR"),
        "Hu, Liu 2004, KDD",
        columns=_TEXT,
        notes="Another split than that of LM-BFF, which tests on 2,000 sentences.",
    ),
    _entry(
        "mpqa",
        "MPQA: is the phrase of an opinion positive?",
        _prompt(_SENTIMENT, _POLARITY),
        _plain("jxm/mpqa"),
        "Wiebe, Wilson, Cardie 2005, Language Resources and Evaluation",
        notes="Label 1 is taken to be positive, as in the files of LM-BFF; the page of the data set does not say.",
    ),
    _entry(
        "subj",
        "Subj: is the sentence objective?",
        _prompt("{sentence} This is {mask}.", {0: "subjective", 1: "objective"}),
        _plain("SetFit/subj"),
        "Pang, Lee 2004, ACL",
        reads=("text", "label_text"),
        convert=subj_row,
        notes="0 is subjective, as in LM-BFF; rows of the hub, where 0 is objective, are turned.",
    ),
    _entry(
        "trec",
        "TREC: what kind of thing does the question ask for?",
        _prompt(
            "{mask}: {sentence}",
            {0: "Expression", 1: "Entity", 2: "Description", 3: "Human", 4: "Location", 5: "Number"},
        ),
        _plain("SetFit/TREC-QC"),
        "Li, Roth 2002, COLING",
        reads=("text", "label_coarse_original"),
        convert=trec_row,
        notes="The six coarse classes: 0 ABBR, 1 ENTY, 2 DESC, 3 HUM, 4 LOC, 5 NUM. LM-BFF numbers them otherwise; the words are the same.",
    ),
    _entry(
        "mnli",
        "MNLI: does the first sentence entail or contradict the second?",
        _prompt(_INFERENCE, _ENTAILS),
        _glue("mnli", "validation_matched"),
        "Williams, Nangia, Bowman 2018, NAACL",
        columns={"premise": "sentence1", "hypothesis": "sentence2"},
    ),
    _entry(
        "snli",
        "SNLI: does the first sentence entail or contradict the second?",
        _prompt(_INFERENCE, _ENTAILS),
        _plain("stanfordnlp/snli"),
        "Bowman et al. 2015, EMNLP",
        reads=("premise", "hypothesis", "label"),
        convert=_snli_row,
        notes="Rows of the hub without a label are left out.",
    ),
    _entry(
        "qnli",
        "QNLI: does the sentence answer the question?",
        _prompt(_INFERENCE, _FOLLOWS),
        _glue("qnli"),
        "Rajpurkar et al. 2016, EMNLP",
        columns={"question": "sentence1", "sentence": "sentence2"},
    ),
    _entry(
        "rte",
        "RTE: does the first sentence entail the second?",
        _prompt(_INFERENCE, _FOLLOWS),
        _glue("rte"),
        "Dagan et al. 2005 and the later RTE rounds",
    ),
    _entry(
        "mrpc",
        "MRPC: do the sentences say the same?",
        _prompt(_PARAPHRASE, _SAME, "f1"),
        _glue("mrpc"),
        "Dolan, Brockett 2005, IWP",
    ),
    _entry(
        "qqp",
        "QQP: do the questions ask the same?",
        _prompt(_PARAPHRASE, _SAME, "f1"),
        _glue("qqp"),
        "Iyer, Dandekar, Csernai 2017 (Quora Question Pairs)",
        columns={"question1": "sentence1", "question2": "sentence2"},
    ),
)
