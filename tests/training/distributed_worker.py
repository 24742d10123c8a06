"""`turnrow` as torchrun starts it, but something happens to one of the processes in the middle of a step."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from turnrow.cli.main import main
from turnrow.training.trainer import GuardedTrainer

what, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
original = GuardedTrainer.training_step


def training_step(self: GuardedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
    now = self.state.global_step + 1
    if now == step and os.environ["RANK"] == rank:
        if what == "error":
            raise OSError("the disk of this process is full")
        # torchrun, which passes it on to all.
        os.kill(os.getppid(), getattr(signal, what))
    if now >= step:
        time.sleep(0.3)
    return original(self, *args, **kwargs)


GuardedTrainer.training_step = training_step  # type: ignore[method-assign]
sys.exit(main(sys.argv[4:]))
