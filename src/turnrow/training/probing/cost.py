"""What a training step of a method takes on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from turnrow.analysis.ntk import Batch
from turnrow.training.precision import precision

__all__ = ["step_seconds"]


def step_seconds(model: nn.Module, batch: Batch, args: TrainingArguments, steps: int = 5) -> float:
    """The quickest of some training steps: forward, backward, and an update of AdamW whose learning rate is 0.

    Args:
        model: trainable, on its device; in training mode meanwhile, its values do not change.
        batch: with labels.
        args: of the run: its precision and device.
        steps: measured after one that is not.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    inputs = {name: value.to(args.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    was_training = model.training
    model.train()
    taken = []
    try:
        for _ in range(steps + 1):
            start = time.perf_counter()
            with precision(args):
                loss: Any = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            taken.append(time.perf_counter() - start)
    finally:
        model.train(was_training)
    return min(taken[1:])
