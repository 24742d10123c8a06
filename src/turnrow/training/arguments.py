"""Arguments of transformers' Trainer: what a recipe may say under ``training``, and what holds where it says nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from turnrow.errors import UserError, near_matches
from turnrow.tasks import Task
from turnrow.training.options import check_options

if TYPE_CHECKING:
    from turnrow.training.recipe import Recipe

__all__ = [
    "EVALUATION_ARGUMENTS",
    "build_arguments",
    "check_training",
    "evaluation_arguments",
    "kept_checkpoints",
    "training_arguments",
]

log = logging.getLogger(__name__)

_KEPT_CHECKPOINTS = 2

# Those training arguments on which the numbers of an evaluation depend; kept with the adapter.
EVALUATION_ARGUMENTS = (
    "per_device_eval_batch_size",
    "bf16",
    "fp16",
    "bf16_full_eval",
    "fp16_full_eval",
    "tf32",
    "use_cpu",
)

_RESERVED = {
    "output_dir": "it is a field of the recipe itself, one level up",
    "seed": "it is a field of the recipe itself, one level up",
    "data_seed": "the recipe's seed orders the data too",
    "full_determinism": "every run is seeded and deterministic already",
    "resume_from_checkpoint": "resume with the flag --resume",
    "deepspeed": "a run is sharded by training.fsdp; docs/distributed.md shows DeepSpeed in a program of your own",
    "do_train": "a run always trains",
    "do_eval": "set eval_strategy instead",
    "do_predict": "a run always predicts the test split",
}

# What transformers takes without a look and fails on later: the lowest value, and the one that all are below.
_RANGES = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "save_total_limit": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
}
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")


def check_training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's `training` section converted to the types of ``transformers.TrainingArguments``.

    Raises:
        UserError: an argument is unknown, not the user's to set, or has a value of another type or out of its range.
    """
    if options.get("fsdp") is True:
        # What transformers wants is not what it declares; its own command line has the same trouble.
        options = {**options, "fsdp": "true"}
    options = check_options(options, TrainingArguments, "training", reserved=_RESERVED)
    for name, (lowest, bound) in _RANGES.items():
        value = options.get(name)
        if value is not None and not lowest <= value < bound:
            below = "" if bound == math.inf else f" and below {bound}"
            raise UserError(f"training.{name} is {value!r}; expected a number from {lowest}{below}")
    for name in _INTERVALS:
        value = options.get(name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(
                f"training.{name} is {value!r}; expected a number of steps, or a share of them between 0 and 1"
            )
    most = options.get("max_steps")
    if most is not None and most < 1 and most != -1:
        raise UserError(
            f"training.max_steps is {most!r}; expected a number from 1, or -1: as long as num_train_epochs says"
        )
    return options


def training_arguments(recipe: Recipe, task: Task, folder: str) -> TrainingArguments:
    """The user's training arguments over our defaults.

    Defaults that differ from transformers': a checkpoint and, where there is a validation split, an evaluation at the end
    of every epoch; about fifty log entries; nothing reported to outside services; the task's main metric chooses the best
    checkpoint when ``load_best_model_at_end`` is set.
    """
    # transformers fills in what is missing in the dictionaries that it is given.
    given = deepcopy(recipe.training)
    evaluates = recipe.data.validates
    if not evaluates and (
        given.get("load_best_model_at_end")
        or given.get("save_strategy") == "best"
        or given.get("eval_strategy", "no") != "no"
        or given.get("eval_on_start")
    ):
        raise UserError("training evaluates on the validation split, but data.validation is missing; name a file there")
    if task.settles and not evaluates:
        raise UserError(
            f"the task {task.name!r} chooses something on the validation split, but data.validation is missing; name a file there"
        )
    eval_strategy = given.get("eval_strategy", ("steps" if "eval_steps" in given else "epoch") if evaluates else "no")
    follows = eval_strategy if given.get("load_best_model_at_end") else "epoch"
    defaults: dict[str, Any] = {
        "eval_strategy": eval_strategy,
        "save_strategy": "steps" if "save_steps" in given else follows,
        "logging_strategy": "steps",
        "logging_steps": 0.02,
        "report_to": "none",
        "label_names": list(task.label_names),
        # Our own guard looks at every loss.
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    defaults |= _best(given, eval_strategy, task)
    if follows == "steps" and "eval_steps" in given:
        defaults["save_steps"] = given["eval_steps"]
    # Checkpoints are deleted by our own callback, only after the newest is sealed.
    arguments = {**defaults, **given, "save_total_limit": None}
    if given.get("fsdp") == "true":
        arguments["fsdp"] = True
    args = build_arguments(arguments, output_dir=folder, seed=recipe.seed, data_seed=recipe.seed)
    if (visible := torch.cuda.device_count()) > 1 and args.world_size == 1 and args.n_gpu == 1:
        log.info("one of %d GPUs is used; for all: torchrun --standalone --nproc_per_node %d ...", visible, visible)
    return args


def _best(given: dict[str, Any], eval_strategy: Any, task: Task) -> dict[str, Any]:
    """The training arguments by which checkpoints are compared, where the user's leave them out; those are changed in place.

    transformers takes more of any metric for better, unless its name ends in ``loss``.
    """
    for name in ("metric_for_best_model", "greater_is_better"):
        if given.get(name) is None:
            given.pop(name, None)
    if given.get("save_strategy") == "best" and eval_strategy == "no":
        raise UserError(
            "training.save_strategy is 'best', but training.eval_strategy is 'no', so that no checkpoint is found to be the best; leave "
            "one of them out"
        )
    if "metric_for_best_model" not in given:
        if not given.get("load_best_model_at_end") and given.get("save_strategy") != "best":
            return {}
        return {"metric_for_best_model": task.main_metric, "greater_is_better": task.greater_is_better}
    metric = given["metric_for_best_model"].removeprefix("eval_")
    # The loss of the model; of what the model writes there is none.
    known = list(dict.fromkeys([*task.metric_names, *([] if task.generates("validation") else ["loss"])]))
    if metric not in known:
        raise UserError(
            f"training.metric_for_best_model is {given['metric_for_best_model']!r}, which the task {task.name!r} does not report; "
            f"allowed: {', '.join(known)}{near_matches(metric, known)}"
        )
    return {"greater_is_better": metric not in {*task.error_metrics, "loss"}}


def kept_checkpoints(recipe: Recipe) -> int | None:
    """How many checkpoints to keep: the user's ``save_total_limit``, else two."""
    return recipe.training.get("save_total_limit", _KEPT_CHECKPOINTS)


def evaluation_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The part of `args` that an evaluation needs to give the same numbers again, as plain values."""
    return {name: getattr(args, name) for name in EVALUATION_ARGUMENTS}


def build_arguments(arguments: Mapping[str, Any], **ours: Any) -> TrainingArguments:
    """transformers' arguments; what it raises of a value is an error of the user."""
    try:
        args = TrainingArguments(**arguments, **ours)
    except (ValueError, TypeError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    if args.n_gpu > 1:
        # Or Trainer would wrap the model in torch.nn.DataParallel, whose threads share each layer's state.
        args._n_gpu = 1
    return args
