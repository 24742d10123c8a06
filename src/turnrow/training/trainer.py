"""transformers' Trainer, configured. Which class of Trainer and which collator a task gets is decided here alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from turnrow.errors import UserError
from turnrow.tasks import Task
from turnrow.training.arguments import build_arguments
from turnrow.training.evaluation import SharedEvaluation
from turnrow.training.finite import FiniteGuard, check_loss
from turnrow.training.generation import generate_batch, texts
from turnrow.training.measure import StepClock
from turnrow.training.progress import ProgressBars
from turnrow.training.rate_factors import scale_rates

__all__ = ["make_trainer", "predict_split"]


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
        args = build_arguments(
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
