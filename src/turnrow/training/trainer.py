"""transformers' Trainer, configured. Which class of Trainer and which collator a task gets is decided here alone."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from turnrow.errors import UserError, near_matches
from turnrow.tasks import Task
from turnrow.training.evaluation import SharedEvaluation
from turnrow.training.finite import FiniteGuard, check_loss
from turnrow.training.generation import generate_batch, texts
from turnrow.training.measure import StepClock
from turnrow.training.progress import ProgressBars
from turnrow.training.rate_factors import scale_rates
from turnrow.training.recipe import Recipe

__all__ = ["EVALUATION_ARGUMENTS", "evaluation_arguments", "make_trainer", "predict_split", "training_arguments"]

log = logging.getLogger(__name__)

DEFAULT_KEPT_CHECKPOINTS = 2

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


class GuardedTrainer(Trainer):
    """Trainer that refuses a loss that is not finite, logs the seconds per step, and prints nothing by itself.

    Args:
        mean_loss: the model's loss is the mean over the rows of its batch. Trainer takes it for a sum over all batches of a
            step, divided by the number of labels in all of them, if only the model's forward has a ``**kwargs`` to take
            that number, whether or not it reads it; and multiplies it by the number of processes.
        generation: how the model goes on with the rows that are evaluated; None: they are read at once.
        rate_factors: multiples of the learning rate by module; see `scale_rates`.
    """

    def __init__(
        self,
        *args: Any,
        mean_loss: bool = False,
        generation: Mapping[str, Any] | None = None,
        rate_factors: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._generation, self._rate_factors = generation, rate_factors
        if mean_loss:
            self.model_accepts_loss_kwargs = False
        self._clock = StepClock()
        self.add_callback(self._clock)
        self.add_callback(FiniteGuard())
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer, with the learning rates of the modules."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self._rate_factors:
            scale_rates(optimizer, self.model if model is None else model, self._rate_factors)  # type: ignore[arg-type]
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        check_loss(loss, self.args, self.state)
        return loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """As in Trainer; where the model answers, its tokens stand for the logits, and labels that say nothing for labels."""
        if self._generation is None:
            # Not every config of transformers says that the cache is no output to be gathered.
            config = getattr(self.model, "config", None)
            ignored = ignore_keys or getattr(config, "keys_to_ignore_at_inference", [])
            return super().prediction_step(model, inputs, prediction_loss_only, [*ignored, "past_key_values"])
        written = generate_batch(self, model, inputs, self._generation)
        return None, written, torch.zeros(len(written), device=written.device)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer; several processes share the work, and get the numbers that one would get."""
        if self.args.world_size > 1:
            dataloader = SharedEvaluation(
                dataloader, self.args.eval_batch_size, self.args.world_size, self.args.process_index
            )
            self.gather_function = dataloader.gather
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; what checkpoints are compared by must be among the figures, which may depend on the rows."""
        metrics = super().evaluate(*args, **kwargs)
        best = self.args.metric_for_best_model
        if best is not None and f"eval_{best.removeprefix('eval_')}" not in metrics:
            raise UserError(
                f"training.metric_for_best_model is {best!r}, which has no value for the validation split; what has one is "
                f"{', '.join(name.removeprefix('eval_') for name in metrics)}"
            )
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (seconds := self._clock.drain()) is not None:
            logs["seconds_per_step"] = seconds
        super().log(logs, *args, **kwargs)


def make_trainer(
    task: Task,
    model: torch.nn.Module,
    tokenizer: Any,
    args: TrainingArguments,
    *,
    train: Dataset | None = None,
    validation: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    answers: str = "validation",
    rate_factors: Mapping[str, float] | None = None,
) -> Trainer:
    """The Trainer for a task.

    Args:
        task: what is learned and how it is scored.
        model: the adapted model.
        tokenizer: as of `Base`; makes the batches.
        args: of the training, or of an evaluation alone.
        train: the encoded training split.
        validation: the encoded validation split.
        callbacks: beside our own.
        answers: the split that is evaluated, which says whether the model answers it.
        rate_factors: the recipe's ``learning_rate_factors``.
    """
    generates = task.generates(answers)

    def scores(kept: EvalPrediction) -> dict[str, float]:
        # Of a task with several labels, their arrays are a tuple.
        predictions: Any = texts(kept.predictions, tokenizer) if generates else kept.predictions
        labels: Any = kept.label_ids
        return task.metrics(predictions, labels, validation)

    return GuardedTrainer(
        model=model,
        args=args,
        data_collator=task.collator(tokenizer),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=scores,
        preprocess_logits_for_metrics=None if generates else task.reduce_logits,
        callbacks=list(callbacks),
        mean_loss=task.mean_loss,
        generation=task.generation_options() if generates else None,
        rate_factors=rate_factors,
    )


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
    args = _build(arguments, output_dir=folder, seed=recipe.seed, data_seed=recipe.seed)
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
    return recipe.training.get("save_total_limit", DEFAULT_KEPT_CHECKPOINTS)


def evaluation_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The part of `args` that an evaluation needs to give the same numbers again, as plain values."""
    return {name: getattr(args, name) for name in EVALUATION_ARGUMENTS}


def predict_split(
    task: Task,
    model: torch.nn.Module,
    tokenizer: Any,
    encoded: Dataset,
    evaluation: Mapping[str, Any],
    *,
    split: str = "test",
    progress: str | None = None,
) -> PredictionOutput:
    """Predictions for the rows of `encoded`, in their order.

    The figures of a run and those of ``evaluate`` and ``predict`` all come from here, from the same batches in the same
    order, so that they are equal to the last bit.

    Args:
        task: gives the collator.
        model: the adapted model.
        tokenizer: as of `Base`; makes the batches.
        encoded: as `Task.encode` returns it.
        evaluation: as `evaluation_arguments` returns it.
        split: which split it is; of one that the model answers, the predictions are texts.
        progress: the label of a progress bar; None for no bar.
    """
    with tempfile.TemporaryDirectory() as scratch:
        args = _build(
            {
                **evaluation,
                # A run on a GPU can be evaluated without one.
                "use_cpu": evaluation.get("use_cpu") or not torch.accelerator.is_available(),
                "report_to": "none",
                "label_names": list(task.label_names),
                "dataloader_pin_memory": torch.cuda.is_available(),
            },
            output_dir=scratch,
        )
        bars = ProgressBars(task.main_metric, progress or "")
        trainer = make_trainer(task, model, tokenizer, args, callbacks=[bars] if progress else [], answers=split)
        # The caller computes them, from the predictions and with the rows at hand.
        trainer.compute_metrics = None
        try:
            output = trainer.predict(encoded)
        finally:
            bars.close()
            # Or accelerate would take the model for one that is ready to be trained too, and several processes would each
            # train their own without ever exchanging a gradient.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            vars(model).pop("_is_accelerate_prepared", None)
    if not task.generates(split):
        return output
    return PredictionOutput(texts(output.predictions, tokenizer), None, output.metrics)


def _build(arguments: Mapping[str, Any], **ours: Any) -> TrainingArguments:
    try:
        args = TrainingArguments(**arguments, **ours)
    except (ValueError, TypeError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    if args.n_gpu > 1:
        # Or Trainer would wrap the model in torch.nn.DataParallel, whose threads share each layer's state.
        args._n_gpu = 1
    return args
