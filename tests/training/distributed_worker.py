"""`turnrow` as torchrun starts it, but something happens to one of the processes in the middle of a step.

With the word "fsdp" before the others accelerate is made to believe that it can shard on CPUs too, which it can.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from turnrow.cli.main import main
from turnrow.training.trainer import GuardedTrainer

words = sys.argv[1 : sys.argv.index("train")]
if words and words[0] == "fsdp":
    words.pop(0)
    make_state = accelerate.state.AcceleratorState.__init__

    def make_sharding_state(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = make_sharding_state  # type: ignore[method-assign]
what, rank, step = words[0], words[1], int(words[2])
original = GuardedTrainer.training_step


def training_step(self: GuardedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
    now = self.state.global_step + 1
    assert isinstance(self.model, FSDPModule) == bool(self.args.fsdp)
    if now == step and os.environ["RANK"] == rank:
        if what == "error":
            raise OSError("the disk of this process is full")
        # torchrun, which passes it on to all.
        os.kill(os.getppid(), getattr(signal, what))
        if what == "SIGTERM":
            time.sleep(60)
    if now >= step:
        time.sleep(0.3)
    return original(self, *args, **kwargs)


GuardedTrainer.training_step = training_step  # type: ignore[method-assign]
sys.exit(main(sys.argv[sys.argv.index("train") :]))
