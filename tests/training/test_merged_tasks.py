"""Adapters of every kind of model merge into one of the same kind, which predicts as they do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from turnrow.cli.main import main
from turnrow.tasks import read_table
from turnrow.training import Recipe, train
from turnrow.training.saved import load_saved

from .conftest import MakeRecipe
from .test_run_extractive_qa import TASK as QUESTIONS
from .test_run_extractive_qa import questions  # noqa: F401
from .test_run_images import TASK as COLOURS
from .test_run_images import colours, tiny_vit  # noqa: F401
from .test_run_prompt import TASK as PROMPT
from .test_run_prompt import masked_base  # noqa: F401
from .test_run_visual import TASK as TALKS
from .test_run_visual import talks, tiny_llava  # noqa: F401


def check(recipe: Recipe, folder: Path) -> None:
    adapter = train(recipe).adapter
    assert main(["merge", "--adapter", str(adapter), "--out", str(folder / "merged")]) == 0
    saved = load_saved(adapter)
    whole = getattr(transformers, saved.task.auto_model).from_pretrained(folder / "merged")
    encoded = saved.task.encode(read_table(recipe.data.splits["test"]), saved.tokenizer, saved.max_length, split="test")
    expected, _ = saved.predict(encoded, "test")
    merged, _ = dataclasses.replace(saved, model=whole.eval()).predict(encoded, "test")
    np.testing.assert_allclose(merged, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "base", "data"),
    [
        (QUESTIONS, "tiny_base", "questions"),
        (PROMPT, "masked_base", None),
        (COLOURS, "tiny_vit", "colours"),
        (TALKS, "tiny_llava", "talks"),
    ],
    ids=["questions", "prompt", "images", "visual"],
)
def test_a_merged_model_predicts_as_its_adapter(
    make_recipe: MakeRecipe,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    task: dict[str, Any],
    base: str,
    data: str | None,
) -> None:
    changes: dict[str, Any] = {"task": task, "model": str(request.getfixturevalue(base)), "training": {"max_steps": 2}}
    if data is not None:
        changes["data"] = request.getfixturevalue(data)
    if base == "tiny_base":
        changes["max_length"] = 20
    check(make_recipe(**changes), tmp_path)
