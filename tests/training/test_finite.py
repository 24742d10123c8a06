from __future__ import annotations

from typing import Any

import pytest
import torch

from turnrow.training import train
from turnrow.training.checkpoints import is_complete
from turnrow.training.finite import NonFiniteError
from turnrow.training.trainer import GuardedTrainer

from .conftest import MakeRecipe

SAVING_EVERY_STEP = {"save_steps": 1, "eval_strategy": "no"}


def spoil_loss(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Let the loss of one step be `value`, gradients included."""
    original = GuardedTrainer.compute_loss

    def compute_loss(self: GuardedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return loss * value if self.is_in_train and self.state.global_step + 1 == step else loss

    monkeypatch.setattr(GuardedTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoil_loss(monkeypatch, 3, value)
    recipe = make_recipe(training=SAVING_EVERY_STEP)
    message = (
        f"the loss is {value} at step 3; training stopped and the last good checkpoint is .*checkpoint-2. Try a lower"
    )
    with pytest.raises(NonFiniteError, match=message) as caught:
        train(recipe)
    assert "training.learning_rate (now 0.01)" in str(caught.value)


def test_the_first_step_has_no_checkpoint_to_name(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, 1, float("nan"))
    with pytest.raises(NonFiniteError, match="at step 1; training stopped and no checkpoint had been written yet"):
        train(make_recipe(training=SAVING_EVERY_STEP))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GuardedTrainer.training_step

    def training_step(self: GuardedTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step + 1 == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(GuardedTrainer, "training_step", training_step)
    with pytest.raises(NonFiniteError, match=r"a gradient is not finite at step 2; .*checkpoint-1\."):
        train(make_recipe(training=SAVING_EVERY_STEP))


def test_weights_that_are_not_finite_are_never_saved(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original = GuardedTrainer.training_step

    def training_step(self: GuardedTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, model, *args, **kwargs)
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(GuardedTrainer, "training_step", training_step)
    with pytest.raises(NonFiniteError, match=r"a trained weight is not finite at step 1; .*no checkpoint"):
        train(make_recipe(training=SAVING_EVERY_STEP))


def test_the_kept_checkpoint_is_whole(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    spoil_loss(monkeypatch, 2, float("nan"))
    with pytest.raises(NonFiniteError, match="at step 2"):
        train(make_recipe(training=SAVING_EVERY_STEP))
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert kept.name == "checkpoint-1"
    assert is_complete(kept)
