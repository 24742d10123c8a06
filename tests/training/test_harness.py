"""The evaluation harness on an adapted model, offline, by a task file of our own; its figures are those of the model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow.cli.main import main
from turnrow.errors import UserError
from turnrow.training import Recipe, train
from turnrow.training.harness import _broken, evaluate_with_harness
from turnrow.training.saved import load_saved

pytest.importorskip("lm_eval", reason="needs turnrow[eval]")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "the {{thing}} is"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROWS = [("house", 0), ("bird", 1), ("tree", 1), ("cat", 0), ("dog", 0)]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"thing": thing, "answer": answer}) + "\n" for thing, answer in ROWS)
    )
    (folder / "colours.yaml").write_text(TASK.replace("FILE", str(folder / "rows.jsonl")))
    return folder


@pytest.fixture
def adapter(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    base = tmp_path / "base"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), max_position_embeddings=64, bos_token_id=2, eos_token_id=3, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(base)
    tiny_tokenizer.eos_token = "[SEP]"
    # What a decoder's tokenizer does: nothing stands behind a text.
    tiny_tokenizer.backend_tokenizer.post_processor = None
    tiny_tokenizer.save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text('{"text": "the house is red . the bird is blue ."}\n' * 8)
    recipe = Recipe(
        model=str(base),
        task={"name": "language_modelling"},
        data={"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")},  # type: ignore[arg-type]
        method={"name": "rocoft", "r": 4},
        training={"learning_rate": 3e-2, "num_train_epochs": 4, "disable_tqdm": True},
        output_dir=str(tmp_path / "run"),
    )
    return train(recipe).adapter


def scores(adapter: Path) -> list[list[float]]:
    """log p of each choice after each prompt, without the harness."""
    saved = load_saved(adapter)
    found = []
    for thing, _ in ROWS:
        row = []
        for choice in ("red", "blue"):
            ids = torch.tensor([saved.tokenizer(f"the {thing} is {choice}", add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                row.append(float(saved.model(input_ids=ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]))
        found.append(row)
    return found


def test_the_harness_finds_the_accuracy_of_the_adapted_model(adapter: Path, tasks: Path) -> None:
    found = evaluate_with_harness(adapter, ["colours"], include=tasks)
    expected = [row.index(max(row)) == answer for row, (_, answer) in zip(scores(adapter), ROWS, strict=True)]
    assert 0 < sum(expected) < len(ROWS), "or the figure would say nothing"
    assert found["results"]["colours"]["acc,none"] == pytest.approx(sum(expected) / len(ROWS))
    assert found["n-samples"]["colours"] == {"original": 5, "effective": 5}
    assert math.isfinite(found["results"]["colours"]["acc_stderr,none"])
    json.dumps(found)


def test_the_command_writes_what_it_prints(
    adapter: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "harness.json"
    words = [
        "evaluate",
        "--adapter",
        str(adapter),
        "--harness",
        "colours",
        "--include-path",
        str(tasks),
        "--limit",
        "2",
    ]
    assert main([*words, "--output", str(output)]) == 0
    printed: Any = json.loads(capsys.readouterr().out)
    assert printed == json.loads(output.read_text())
    assert printed["n-samples"]["colours"]["effective"] == 2
    assert main(["evaluate", "--adapter", str(adapter), "--data", "x.jsonl", "--limit", "2"]) == 2
    assert "--limit is for the harness: give --harness TASKS" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--limit", "0"], ["--num-fewshot", "0"], ["--batch-size", "0"], ["--chat"]])
def test_options_of_the_harness_are_for_the_harness(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--adapter", "nowhere", "--data", "x.jsonl", *words]) == 2
    assert f"{words[0]} is for the harness: give --harness TASKS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0; expected a whole number from 1"),
        ({"num_fewshot": -1}, "num_fewshot is -1; expected a whole number from 0"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number from 1"),
        ({"tasks": []}, "no task of the harness is named"),
        ({"include": "nowhere"}, "there is no folder 'nowhere' with tasks of your own"),
    ],
)
def test_what_the_harness_cannot_do_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_with_harness("no_adapter", **{"tasks": ["colours"], **options})


def test_rows_that_cannot_be_read_are_said_in_one_line(adapter: Path, tasks: Path) -> None:
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="^the harness cannot read what colours asks for: .*rows.jsonl.*$"):
        evaluate_with_harness(adapter, ["colours"], include=tasks)


def test_a_file_of_tasks_that_is_no_yaml_is_named(tasks: Path) -> None:
    (tasks / "colours.yaml").write_text("task: [colours")
    assert re.fullmatch(r".*colours.yaml is not readable as YAML: while parsing [^\n]*", _broken(tasks))


def test_an_adapter_of_peft_alone_is_evaluated_too(adapter: Path, tasks: Path) -> None:
    found = evaluate_with_harness(adapter, ["colours"], include=tasks)
    (adapter / "task.json").unlink()
    assert evaluate_with_harness(adapter, ["colours"], include=tasks)["results"] == found["results"]


def test_a_model_that_is_no_language_model_is_refused(tasks: Path, films: Path, headed_base: Path) -> None:
    classifier = train(
        Recipe(
            model=str(headed_base),
            task={"name": "classification", "text": "sentence"},
            data={"folder": str(films)},  # type: ignore[arg-type]
            method={"name": "head"},
            training={"max_steps": 1, "disable_tqdm": True},
            output_dir=str(films / "run"),
        )
    )
    with pytest.raises(
        UserError, match="adapts a BertForSequenceClassification .the task 'classification'., and the harn"
    ):
        evaluate_with_harness(classifier.adapter, ["colours"], include=tasks)


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_near_ones(adapter: Path, tasks: Path) -> None:
    with pytest.raises(UserError, match="the harness has no task 'hellaswagg'; did you mean .*'hellaswag'"):
        evaluate_with_harness(adapter, ["colours", "hellaswagg"], include=tasks)
