"""Tasks with rows of unequal length, several labels, images and answers of the model's own, on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from turnrow.training import evaluate_adapter, train

from ..torchrun import torchrun
from .conftest import MakeRecipe
from .test_run_extractive_qa import TASK as QUESTIONS
from .test_run_extractive_qa import questions  # noqa: F401
from .test_run_images import TASK as COLOURS
from .test_run_images import colours, tiny_vit  # noqa: F401
from .test_run_prompt import TASK as PROMPT
from .test_run_prompt import masked_base  # noqa: F401
from .test_run_visual import TASK as TALKS
from .test_run_visual import talks, tiny_llava  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "base", "data"),
    [
        ({**QUESTIONS, "no_answer_threshold": "validation"}, "tiny_base", "questions"),
        (PROMPT, "masked_base", None),
        (COLOURS, "tiny_vit", "colours"),
        ({**TALKS, "answers": True}, "tiny_llava", "talks"),
    ],
    ids=["questions", "prompt", "images", "visual"],
)
def test_two_processes_score_as_one_does(
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
    one = train(make_recipe(**changes, output_dir=str(tmp_path / "one")))
    recipe = make_recipe(**changes)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    code, _, err = torchrun("-m", "turnrow", "train", "--config", str(tmp_path / "recipe.yaml"))
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["before"] == one.metrics["before"]
    assert metrics["after"] == evaluate_adapter(tmp_path / "run" / "adapter", recipe.data.splits["test"], quiet=True)
