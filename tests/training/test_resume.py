"""A run that was cut short and resumed ends with the same bytes as one that was not."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from turnrow.errors import UserError
from turnrow.training import train
from turnrow.training.trainer import GuardedTrainer

from .conftest import MakeRecipe

WEIGHTS = "adapter_model.safetensors"

# Dropout, a warm-up and a falling learning rate, so that the random state, the optimizer and the schedule all count.
METHODS: dict[str, dict[str, Any]] = {
    "rocoft rows": {"name": "rocoft", "mode": "row", "r": 2},
    "rocoft columns": {"name": "rocoft", "mode": "column", "r": 2, "bias": "rocoft_only"},
    "road": {"name": "road", "variant": "road_1", "group_size": 8},
    "lora": {"name": "lora", "r": 2, "target_modules": "all-linear", "lora_dropout": 0.2},
    "full": {"name": "full"},
}
TRAINING = {"save_steps": 3, "warmup_steps": 2, "weight_decay": 0.1, "eval_strategy": "no"}

# Runs the command with one function replaced: it ends the process by SIGKILL at its nth call.
KILLED = """
import importlib, os, signal, sys
module, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
original = getattr(owner, name)
def deadly(*args, **kwargs):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, deadly)
from turnrow.cli.main import main
sys.exit(main(sys.argv[4:]))
"""


class CrashError(Exception):
    pass


def crash(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = GuardedTrainer.training_step

    def training_step(self: GuardedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            raise CrashError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GuardedTrainer, "training_step", training_step)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_resumed_run_ends_with_the_same_weights(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Cut short within the second epoch, resumed from within the first."""
    whole = train(make_recipe(method=method, training=TRAINING, output_dir=str(tmp_path / "whole")))
    recipe = make_recipe(method=method, training=TRAINING)
    with monkeypatch.context() as patch:
        crash(patch, 6)
        with pytest.raises(CrashError):
            train(recipe)
    resumed = train(recipe, resume=True)
    assert resumed.metrics["resumed_from_step"] == 3
    for file in whole.adapter.iterdir():
        assert (resumed.adapter / file.name).read_bytes() == file.read_bytes(), file.name
    assert resumed.folder.predictions.read_bytes() == whole.folder.predictions.read_bytes()
    assert resumed.metrics["after"] == whole.metrics["after"]
    assert resumed.metrics["before"] == whole.metrics["before"]


@pytest.mark.parametrize("method", ["rocoft rows", "full"])
def test_the_best_checkpoint_is_found_again_after_a_resume(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    training = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    changes = {"method": METHODS[method], "training": {**training, "num_train_epochs": 3, "save_total_limit": 1}}
    whole = train(make_recipe(**changes, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        crash(patch, 10)
        with pytest.raises(CrashError):
            train(make_recipe(**changes))
    resumed = train(make_recipe(**changes), resume=True)
    assert resumed.metrics["checkpoint_step"] == whole.metrics["checkpoint_step"]
    name = "model.safetensors" if method == "full" else WEIGHTS
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_checkpoint_at_the_end_of_an_epoch_holds_the_evaluation_there(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"method": METHODS["lora"], "training": {"save_steps": 4, "eval_strategy": "epoch"}}
    whole = train(make_recipe(**changes, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        crash(patch, 5)
        with pytest.raises(CrashError):
            train(make_recipe(**changes))
    resumed = train(make_recipe(**changes), resume=True)
    assert resumed.metrics["resumed_from_step"] == 4
    assert (resumed.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()
    assert [run.folder.history.read_text().count("eval_loss") for run in (whole, resumed)] == [2, 2]


def test_a_run_without_a_checkpoint_starts_from_the_beginning(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train(make_recipe(output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        crash(patch, 2)
        with pytest.raises(CrashError):
            train(make_recipe())
    with pytest.raises(UserError, match="already holds an unfinished run"):
        train(make_recipe())
    resumed = train(make_recipe(), resume=True)
    assert resumed.metrics["resumed_from_step"] is None
    assert (resumed.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()


def test_a_run_killed_after_training_only_writes_its_results(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train(make_recipe(output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr("turnrow.training.run.write_predictions", lambda *args: (_ for _ in ()).throw(CrashError))
        with pytest.raises(CrashError):
            train(make_recipe())
    resumed = train(make_recipe(), resume=True)
    assert resumed.metrics["resumed_from_step"] == resumed.metrics["steps"] == 8
    assert (resumed.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("victim", "calls", "resumed_from", "ignored"),
    [
        (("turnrow.training.trainer", "GuardedTrainer.training_step"), 6, 4, None),
        # The files of checkpoint-4 are all there, but it is not sealed.
        pytest.param(("turnrow.training.checkpoints", "seal"), 2, 2, "checkpoint-4", marks=pytest.mark.slow),
        # The weights of checkpoint-4 are there, its optimizer is not.
        (("transformers", "Trainer._save_optimizer_and_scheduler"), 2, 2, "checkpoint-4"),
    ],
    ids=["within a step", "before the seal", "within a checkpoint"],
)
def test_a_killed_process_is_resumed_to_the_same_bytes(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    victim: tuple[str, str],
    calls: int,
    resumed_from: int,
    ignored: str | None,
) -> None:
    training = {"save_steps": 2, "eval_strategy": "no"}
    whole = train(make_recipe(training=training, output_dir=str(tmp_path / "whole")))
    recipe = make_recipe(training=training)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    command = [sys.executable, "-c", KILLED, *victim, str(calls), "train", "--config", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with caplog.at_level(logging.INFO, logger="turnrow"):
        resumed = train(recipe, resume=True)
    assert resumed.metrics["resumed_from_step"] == resumed_from
    assert f"resuming from {resumed.folder.checkpoints / f'checkpoint-{resumed_from}'}" in caplog.messages
    if ignored is not None:
        assert f"{resumed.folder.checkpoints / ignored} was cut short and is deleted" in caplog.messages
    for file in whole.adapter.iterdir():
        assert (resumed.adapter / file.name).read_bytes() == file.read_bytes(), file.name
