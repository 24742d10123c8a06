from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from turnrow.training import Interrupted, train
from turnrow.training.trainer import GuardedTrainer

from .conftest import MakeRecipe

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """In the middle of one step."""
    original = GuardedTrainer.compute_loss

    def compute_loss(self: GuardedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.is_in_train and self.state.global_step + 1 == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GuardedTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("step", [2, 4], ids=["within an epoch", "at its end"])
def test_ctrl_c_keeps_a_checkpoint_from_which_the_run_ends_the_same(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    whole = train(make_recipe(output_dir=str(tmp_path / "whole")))
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, step)
        with pytest.raises(
            Interrupted, match=rf"after step {step} of 8; .*checkpoint-{step} is kept. Go on .* --resume"
        ):
            train(recipe)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(recipe, resume=True)
    assert resumed.metrics["resumed_from_step"] == step
    assert (resumed.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()
    # An epoch's evaluation is neither lost nor done twice.
    assert resumed.folder.history.read_text().count("eval_loss") == whole.folder.history.read_text().count("eval_loss")


def test_a_second_ctrl_c_stops_at_once(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c(monkeypatch, 2, times=2)
    with pytest.raises(Interrupted, match="interrupted; no checkpoint had been written yet"):
        train(make_recipe())
