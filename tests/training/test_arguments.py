from __future__ import annotations

import logging
from typing import Any

import pytest
from transformers import TrainingArguments

from turnrow.errors import UserError
from turnrow.tasks import make_task
from turnrow.training.arguments import kept_checkpoints, training_arguments

from .conftest import MakeRecipe

TASK = make_task("regression", text="sentence", label="stars", metric="mse")


def arguments(make_recipe: MakeRecipe, tmp_path: Any, **training: Any) -> Any:
    return training_arguments(make_recipe(training=training), TASK, str(tmp_path / "checkpoints"))


def test_defaults_evaluate_and_save_every_epoch_and_report_to_nobody(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    args = arguments(make_recipe, tmp_path)
    assert (args.eval_strategy, args.save_strategy, args.report_to) == ("epoch", "epoch", [])
    assert kept_checkpoints(make_recipe()) == 2


def test_the_seed_of_the_recipe_orders_the_data_too(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    args = training_arguments(make_recipe(seed=7), TASK, str(tmp_path))
    assert (args.seed, args.data_seed) == (7, 7)


def test_giving_steps_is_enough(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    args = arguments(make_recipe, tmp_path, save_steps=5, eval_steps=3)
    assert (args.save_strategy, args.save_steps, args.eval_strategy, args.eval_steps) == ("steps", 5, "steps", 3)


def test_the_best_checkpoint_is_chosen_by_the_main_metric(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    args = arguments(make_recipe, tmp_path, load_best_model_at_end=True, eval_steps=3)
    assert (args.metric_for_best_model, args.greater_is_better) == ("mse", False)
    assert (args.save_strategy, args.save_steps) == ("steps", 3)


@pytest.mark.parametrize(
    ("task", "metric", "greater"),
    [
        ("regression", "mse", False),
        ("regression", "eval_spearman", True),
        ("regression", "eval_loss", False),
        ("language_modelling", "perplexity", False),
        ("language_modelling", "eval_bits_per_byte", False),
        ("gsm8k", "unparsable", False),
        ("gsm8k", "accuracy", True),
        ("gsm8k", None, True),
    ],
)
def test_of_an_error_less_is_better_whatever_it_is_called(
    make_recipe: MakeRecipe, tmp_path: Any, task: str, metric: str | None, greater: bool
) -> None:
    recipe = make_recipe(training={"load_best_model_at_end": True, "metric_for_best_model": metric})
    made = make_task(task, **({"text": "sentence", "label": "stars"} if task == "regression" else {}))
    args = training_arguments(recipe, made, str(tmp_path))
    assert (args.metric_for_best_model, args.greater_is_better) == (metric or "accuracy", greater)
    turned = {**recipe.training, "greater_is_better": not greater}
    assert training_arguments(make_recipe(training=turned), made, str(tmp_path)).greater_is_better is not greater


def test_a_metric_that_the_task_does_not_report_is_refused(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    with pytest.raises(
        UserError, match=r"is 'mes', .* 'regression' .* pearson, spearman, mse, loss; did you mean 'mse'"
    ):
        arguments(make_recipe, tmp_path, metric_for_best_model="mes")
    # Of what a model writes there is no loss.
    recipe = make_recipe(training={"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"})
    with pytest.raises(UserError, match=r"is 'eval_loss', .* allowed: accuracy, unparsable, answered_accuracy$"):
        training_arguments(recipe, make_task("gsm8k"), str(tmp_path))


def test_the_best_checkpoints_alone_are_saved_by_the_main_metric(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    args = arguments(make_recipe, tmp_path, save_strategy="best")
    assert (args.save_strategy, args.metric_for_best_model, args.greater_is_better) == ("best", "mse", False)
    with pytest.raises(UserError, match="save_strategy is 'best', but training.eval_strategy is 'no'"):
        arguments(make_recipe, tmp_path, save_strategy="best", eval_strategy="no")


def test_without_a_validation_split_nothing_is_evaluated(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    recipe = make_recipe()
    data = {"train": recipe.data.train, "test": recipe.data.test}
    assert training_arguments(make_recipe(data=data), TASK, str(tmp_path)).eval_strategy == "no"
    for training in (
        {"load_best_model_at_end": True},
        {"eval_strategy": "steps"},
        {"save_strategy": "best"},
    ):
        with pytest.raises(UserError, match=r"data\.validation is missing; name a file"):
            training_arguments(make_recipe(data=data, training=training), TASK, str(tmp_path))


def test_one_process_uses_one_gpu_and_says_how_to_use_all(
    make_recipe: MakeRecipe, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = TrainingArguments.__post_init__

    def on_two_gpus(self: TrainingArguments) -> None:
        made(self)
        assert self.device
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_two_gpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with caplog.at_level(logging.INFO, logger="turnrow"):
        assert arguments(make_recipe, tmp_path).n_gpu == 1
    assert "one of 2 GPUs is used; for all: torchrun --standalone --nproc_per_node 2" in caplog.text


def test_the_recipe_stays_as_it_was_given(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    recipe = make_recipe(training={"fsdp": True, "fsdp_config": {"version": 2}})
    assert training_arguments(recipe, TASK, str(tmp_path)).fsdp_config != {"version": 2}
    assert recipe.training["fsdp_config"] == {"version": 2}


def test_what_transformers_refuses_is_an_error_of_the_user(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="training: .*sometimes"):
        arguments(make_recipe, tmp_path, eval_strategy="sometimes")
