from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from turnrow.adapters.manifest import recipe_sha256
from turnrow.errors import UserError
from turnrow.training import Recipe, RunResult, evaluate_adapter, predict, train

from .conftest import MakeRecipe


@pytest.fixture
def result(make_recipe: MakeRecipe) -> RunResult:
    return train(make_recipe(training={"max_steps": 1}))


def test_rows_need_no_labels(result: RunResult) -> None:
    (row,) = predict(result.adapter, [{"sentence": "a good film"}], quiet=True)
    assert row.keys() == {"sentence", "prediction", "probability"}
    assert row["prediction"] in (0, 1)


def test_a_base_that_moved_can_be_named(result: RunResult, make_recipe: MakeRecipe, tiny_base: Path) -> None:
    moved = tiny_base.rename(tiny_base.with_name("elsewhere"))
    data = make_recipe().data.test
    with pytest.raises(UserError, match="model '.*base' cannot be loaded"):
        evaluate_adapter(result.adapter, data, quiet=True)
    assert evaluate_adapter(result.adapter, data, model=str(moved), quiet=True) == result.metrics["after"]


def test_the_folder_alone_and_the_base_are_enough(
    result: RunResult, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = shutil.copytree(result.adapter, tmp_path / "alone")
    shutil.rmtree(result.folder.root)
    monkeypatch.chdir("/")
    assert evaluate_adapter(alone, make_recipe().data.test, quiet=True) == result.metrics["after"]


def test_a_whole_model_needs_no_base(make_recipe: MakeRecipe, tiny_base: Path) -> None:
    recipe = make_recipe(method={"name": "full"}, training={"max_steps": 1})
    adapter = train(recipe).adapter
    shutil.move(tiny_base, tiny_base.with_name("elsewhere"))
    evaluate_adapter(adapter, recipe.data.test, quiet=True)
    with pytest.raises(UserError, match="holds a whole model, which needs no base"):
        evaluate_adapter(adapter, recipe.data.test, model="other", quiet=True)


def test_the_folder_of_the_run_is_answered_with_that_of_the_adapter(result: RunResult) -> None:
    with pytest.raises(UserError, match=r"has no task\.json; did you mean '.*adapter'"):
        predict(result.folder.root, [{"sentence": "a"}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no task\.json, so turnrow train did not write it"),
        ("{", r"task\.json is not readable as JSON"),
        ('{"version": 9}', "has version 9; this turnrow reads version 1"),
    ],
)
def test_folders_of_others_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "task.json").write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate_adapter(tmp_path, "data.jsonl")


def test_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no adapter folder '.*nowhere'"):
        evaluate_adapter(tmp_path / "nowhere", "data.jsonl")


def test_an_altered_adapter_is_refused(result: RunResult, make_recipe: MakeRecipe) -> None:
    weights = result.adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="altered"):
        evaluate_adapter(result.adapter, make_recipe().data.test, quiet=True)


def test_the_manifest_tells_recipe_and_figures_but_no_timings(result: RunResult) -> None:
    provenance = json.loads((result.adapter / "turnrow.json").read_text())["provenance"]
    assert provenance["recipe"]["method"]["name"] == "rocoft"
    assert "output_dir" not in provenance["recipe"]
    written = Recipe.from_yaml(result.folder.root / "recipe.yaml")
    assert provenance["recipe_sha256"] == recipe_sha256(written.to_dict())  # the folder of the run is no part of it
    assert provenance["metrics"] == {name: result.metrics[name] for name in ("before", "after")}
