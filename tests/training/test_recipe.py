from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from turnrow.errors import UserError
from turnrow.training import DataFiles, Recipe

ISSUE = """
model: PATH_OR_HUB_ID
task: {name: classification, text: [sentence], label: label}
data: {train: TRAIN, validation: VALIDATION, test: TEST}
method: {name: rocoft, mode: row, r: 3}
training: {learning_rate: 2e-3, num_train_epochs: 3, per_device_train_batch_size: 32}
seed: 0
output_dir: runs/sst2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(ISSUE)
    return path


def valid(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(ISSUE), **changes}


def test_the_form_of_the_issue_is_read(file: Path) -> None:
    recipe = Recipe.from_yaml(file)
    assert recipe.data == DataFiles(train="TRAIN", validation="VALIDATION", test="TEST")
    assert recipe.method == {"name": "rocoft", "mode": "row", "r": 3}
    assert recipe.training == {"learning_rate": 0.002, "num_train_epochs": 3, "per_device_train_batch_size": 32}
    assert (recipe.seed, recipe.output_dir, recipe.dtype, recipe.max_length) == (0, "runs/sst2", "float32", None)


def test_yaml_round_trip_gives_the_same_recipe(file: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(file, ["--max_length", "64", "--training.lr_scheduler_kwargs", "{power: 2}"])
    again = tmp_path / "deep" / "again.yaml"
    text = recipe.to_yaml(again)
    assert again.read_text() == text
    assert Recipe.from_yaml(again) == recipe


def test_words_that_old_yaml_reads_otherwise_keep_their_meaning(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        ISSUE.replace("label: label", "label: 'no'").replace("training: {", "training: {eval_strategy: no, ")
    )
    recipe = Recipe.from_yaml(path)
    assert (recipe.task["label"], recipe.training["eval_strategy"]) == ("no", "no")
    recipe.to_yaml(path)
    assert Recipe.from_yaml(path, ["--training.save_strategy", "no"]).training["save_strategy"] == "no"
    assert Recipe.from_yaml(path) == recipe


@pytest.mark.parametrize("part", ["50%:", ":50%", "8:16", "1::2", "8:", "25%:75%"])
def test_slices_are_text_in_a_file_and_on_the_command_line(part: str, file: Path, tmp_path: Path) -> None:
    changed = Recipe.from_yaml(file, ["--method", "{name: rocoft, r: 1}", "--method.within", part])
    assert changed.method["within"] == part
    changed.to_yaml(tmp_path / "written.yaml")
    assert Recipe.from_yaml(tmp_path / "written.yaml").method["within"] == part


def test_written_recipe_says_its_version(file: Path) -> None:
    assert yaml.safe_load(Recipe.from_yaml(file).to_yaml())["version"] == 1


def test_overrides_reach_every_level(file: Path) -> None:
    words = ["--method.r", "4", "--training.warmup_steps=2e2", "--data.test", "OTHER", "--task.text=[a, b]", "--seed=7"]
    recipe = Recipe.from_yaml(file, words)
    assert (recipe.method["r"], recipe.training["warmup_steps"], recipe.data.test) == (4, 200, "OTHER")
    assert (recipe.task["text"], recipe.seed, recipe.method["mode"]) == (["a", "b"], 7, "row")


def test_a_section_is_replaced_as_a_whole(file: Path) -> None:
    assert Recipe.from_yaml(file, ["--method", "{name: lora, r: 8}"]).method == {"name": "lora", "r": 8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metod.r", "1"], "the recipe has no field 'metod'; did you mean 'method'"),
        (["--data.tset", "1"], "data has no field 'tset'; did you mean 'test'"),
        (["--training.learning_rat", "1"], "training has no field 'learning_rat'; did you mean 'learning_rate'"),
        (["--method.mod", "row"], "method rocoft has no field 'mod'; did you mean 'mode'"),
        (["--task.lable", "x"], "task 'classification' has no option 'lable'.*did you mean 'label'"),
        (["--training.learning_rate", "fast"], "training.learning_rate is 'fast'; expected"),
        (["--training.output_dir", "x"], "training.output_dir cannot be set here: it is a field of the recipe itself"),
        (["--training.resume_from_checkpoint", "x"], "resume with the flag --resume"),
        (["--method.task_type", "x"], "method rocoft.task_type cannot be set here: the task decides it"),
        (["--method.name", "rocofft"], "there is no method 'rocofft'; did you mean 'rocoft'"),
        (["--method.name", "head"], "method head has no field 'mode'"),
        (["--method.r", "0"], "r=0|r must|r is 0|positive"),
        (["--seed", "-1"], "seed is -1; expected an integer from 0"),
        (["--seed", "x"], "seed.*Expected a <class 'int'>"),
        (["--max_length", "0"], "max_length is 0; expected an integer from 1"),
        (["--dtype", "float8"], "dtype.*float32"),
        (["--version", "2"], "recipe version is 2; this turnrow reads version 1"),
        (["--model", ""], "model is "),
        (["--seed"], "seed.*expected"),
        (["stray"], "[Uu]nrecognized arguments: stray"),
    ],
)
def test_bad_overrides_are_refused(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.from_yaml(file, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not readable as YAML"),
        ("- a", "holds list, not a mapping"),
        (ISSUE + "leraning: 1", "has no field 'leraning'"),
        (ISSUE.replace("test: TEST", "tests: TEST"), "data has no field 'tests'; did you mean 'test'"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Recipe.from_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no recipe file .*none\.yaml"):
        Recipe.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rocoft"}, "method is 'rocoft'; expected a mapping"),
        ({"method": {"r": 1}}, "method has no name"),
        ({"task": {"text": "a"}}, "task has no name"),
        ({"task": {"name": "classifcation", "text": "a"}}, "unknown task 'classifcation'"),
        ({"data": "file"}, "data is 'file'; expected a mapping"),
        ({"data": {"train": "a"}}, "data.test is missing"),
        ({"seed": True}, "seed is True"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed are float32"),
        ({"method": {"name": "full"}, "dtype": "bfloat16"}, "method full trains every weight .* dtype is bfloat16"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.from_dict(valid(**changes))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", -1, "from 0$"),
        ("learning_rate", float("nan"), "from 0$"),
        ("adam_beta1", 1.5, "from 0 and below 1$"),
        ("adam_beta2", 1, "from 0 and below 1$"),
        ("per_device_train_batch_size", 0, "from 1$"),
        ("per_device_eval_batch_size", -2, "from 1$"),
        ("gradient_accumulation_steps", 0, "from 1$"),
        ("dataloader_num_workers", -1, "from 0$"),
        ("eval_accumulation_steps", 0, "from 1$"),
        ("max_grad_norm", -1, "from 0$"),
        ("label_smoothing_factor", 1.5, "from 0 and below 1$"),
        ("neftune_noise_alpha", -1, "from 0$"),
        ("save_total_limit", -1, "from 0$"),
        ("save_steps", 0, "of steps, or a share of them between 0 and 1$"),
        ("eval_steps", -1, "of steps, or a share of them between 0 and 1$"),
        ("max_steps", 0, "from 1, or -1: as long as num_train_epochs says$"),
        ("max_steps", -5, "from 1, or -1: as long as num_train_epochs says$"),
    ],
)
def test_training_arguments_out_of_their_range_are_refused(name: str, value: float, expected: str) -> None:
    with pytest.raises(UserError, match=rf"training\.{name} is {value}.*; expected a number {expected}"):
        Recipe.from_dict(valid(training={name: value}))


def test_missing_fields_are_named() -> None:
    with pytest.raises(UserError, match="the recipe lacks method, output_dir"):
        Recipe.from_dict({k: v for k, v in valid().items() if k not in ("method", "output_dir")})


def test_a_recipe_does_not_change_with_the_callers_dictionaries() -> None:
    values = valid()
    recipe = Recipe(**values)
    values["method"]["r"] = 99
    assert recipe.method["r"] == 3


def test_relative_paths_are_looked_up_here_first_then_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    for path in (beside / "TRAIN", beside / "TEST", here / "TEST"):
        path.touch()
    (beside / "recipe.yaml").write_text(ISSUE)
    monkeypatch.chdir(here)
    recipe = Recipe.from_yaml("../recipes/recipe.yaml")
    assert recipe.data == DataFiles(train="../recipes/TRAIN", validation="VALIDATION", test="TEST")
    assert (recipe.model, recipe.output_dir) == ("PATH_OR_HUB_ID", "runs/sst2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rte").mkdir()
    for name in ("train.jsonl.gz", "test.csv", "README.md"):
        (tmp_path / "rte" / name).touch()
    return tmp_path / "rte"


def test_a_folder_holds_files_called_after_the_splits(folder: Path) -> None:
    recipe = Recipe.from_dict(valid(data={"folder": str(folder)}))
    assert recipe.data == DataFiles(train=str(folder / "train.jsonl.gz"), test=str(folder / "test.csv"))
    named = Recipe.from_dict(valid(data={"folder": str(folder), "test": "OTHER"}))
    assert named.data.splits == {"train": str(folder / "train.jsonl.gz"), "test": "OTHER"}


def test_a_folder_is_looked_up_beside_the_recipe_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(ISSUE.replace("{train: TRAIN, validation: VALIDATION, test: TEST}", "{folder: rte}"))
    assert Recipe.from_yaml(path).data.splits == {
        "train": str(folder / "train.jsonl.gz"),
        "test": str(folder / "test.csv"),
    }


def test_a_folder_that_does_not_say_which_file_it_is_is_refused(folder: Path) -> None:
    (folder / "test.jsonl").touch()
    with pytest.raises(UserError, match="holds the split 'test' more than once: test.jsonl, test.csv"):
        Recipe.from_dict(valid(data={"folder": str(folder)}))
    (folder / "test.jsonl").unlink()
    (folder / "test.csv").unlink()
    with pytest.raises(UserError, match="data.test is missing"):
        Recipe.from_dict(valid(data={"folder": str(folder)}))
    (folder / "train.jsonl.gz").unlink()
    with pytest.raises(UserError, match="holds no file named after a split, such as train.jsonl"):
        Recipe.from_dict(valid(data={"folder": str(folder)}))
    with pytest.raises(UserError, match="data folder 'nowhere' does not exist"):
        Recipe.from_dict(valid(data={"folder": "nowhere"}))


def test_a_known_data_set_has_its_splits_on_the_hub() -> None:
    values = {name: value for name, value in valid(task={"name": "cola"}).items() if name != "data"}
    recipe = Recipe.from_dict(values)
    assert recipe.data.splits == {
        "train": "nyu-mll/glue:cola:train",
        "validation": "nyu-mll/glue:cola:validation[:50%]",
        "test": "nyu-mll/glue:cola:validation[50%:]",
    }
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    # Own files are never mixed with those of the hub.
    with pytest.raises(UserError, match="data.test is missing; .*of cola the hub has train, validation, test"):
        Recipe.from_dict({**values, "data": {"train": "TRAIN"}})
    with pytest.raises(UserError, match="data.train is missing; name the file or hub id of the train split$"):
        Recipe.from_dict({**values, "task": {"name": "classification", "text": "a"}})
