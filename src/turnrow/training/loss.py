"""The loss of a task in place of the model's own, wherever the model is asked for one: Trainer, calibration, plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from turnrow.tasks import Task

__all__ = ["use_loss_of"]


def use_loss_of(task: Task, model: nn.Module) -> None:
    """Let `model` return the loss of `task`, if that has one, whenever it is called with labels."""
    if type(task).loss is Task.loss:
        return

    def replace(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> Any:
        if (labels := inputs.get("labels")) is not None:
            output["loss"] = task.loss(output["logits"], labels)
        return output

    model.register_forward_hook(replace, with_kwargs=True)
