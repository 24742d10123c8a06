"""Stop a run at the first loss, gradient or weight that is not finite, before it reaches a checkpoint.

Trainer's ``logging_nan_inf_filter`` hides such losses from the log and goes on; everything trained afterwards is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from turnrow.errors import UserError
from turnrow.training.checkpoints import last_complete

__all__ = ["FiniteGuard", "NonFiniteError", "check_loss"]


class NonFiniteError(UserError):
    """Training left the finite numbers; the text names the step, the last good checkpoint and what to try."""


class FiniteGuard(TrainerCallback):
    """Looks at the gradients before each update and at the trained weights before each checkpoint."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse gradients that are not finite."""
        # The loss scaler of fp16 meets infinite gradients in the normal course and skips the update itself.
        if args.fp16:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not _all_finite(gradients):
            raise _error("a gradient", "not finite", args, state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse weights that are not finite, if a checkpoint follows."""
        self._check_weights(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse weights that are not finite, if a checkpoint follows."""
        self._check_weights(args, state, control, kwargs["model"])

    def _check_weights(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module
    ) -> None:
        if control.should_save and not _all_finite([p.detach() for p in model.parameters() if p.requires_grad]):
            raise _error("a trained weight", "not finite", args, state.global_step)


def check_loss(loss: torch.Tensor, args: TrainingArguments, state: TrainerState) -> None:
    """Raise NonFiniteError if the loss of the step now under way is NaN or infinite."""
    if not torch.isfinite(loss).all():
        raise _error("the loss", str(loss.mean().item()), args, state.global_step + 1)


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    if not tensors:
        return True
    # One reduction over all tensors and one wait for the device. The largest magnitude cannot overflow, a 2-norm can.
    norms = torch._foreach_norm(tensors, float("inf"))
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def _error(what: str, value: str, args: TrainingArguments, step: int) -> NonFiniteError:
    checkpoint = last_complete(Path(str(args.output_dir)))
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
    return NonFiniteError(
        f"{what} is {value} at step {step}; training stopped and {kept}. Try a lower training.learning_rate (now "
        f"{args.learning_rate:g}), training.warmup_steps, a smaller training.max_grad_norm (now {args.max_grad_norm:g}), "
        "or bf16 instead of fp16, and start again with --overwrite"
    )
