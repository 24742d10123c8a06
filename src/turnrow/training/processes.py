"""The processes of a run: one, or several started by `torchrun`.

All of them train and evaluate; the first one alone writes files and speaks.
"""

from __future__ import annotations

import os
import time
from typing import TypeVar

import torch
from torch import distributed

__all__ = ["any_process", "are_several", "from_first", "is_first", "let_others_speak", "wait_for_all"]

T = TypeVar("T")

GRACE = 15.0
"""Seconds that a process holds back an error which another one probably reports."""


def is_first() -> bool:
    """Whether this process writes the files and speaks. Known before the processes have found each other."""
    if are_several():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def are_several() -> bool:
    """Whether there are other processes, and they have found each other."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_first(value: T) -> T:
    """The first process' `value`, on all of them. They wait for it."""
    if not are_several():
        return value
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if are_several():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def any_process(said: bool, device: torch.device) -> bool:
    """Whether one of the processes said so; all must ask at the same step."""
    if not are_several():
        return said
    flag = torch.tensor(int(said), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)


def let_others_speak(error: BaseException) -> None:
    """Before an error is reported: give way to the process that has more to say about it.

    Most errors come to all processes alike, and the first one reports them. An error that only says that another process
    is gone is that one's to explain. `torchrun` ends all processes as soon as one has ended, so who waits here is mostly
    ended before the time is up; who is not was the only one with an error, and reports it.
    """
    if not is_first() or _tells_of_another(error):
        time.sleep(GRACE)


def _tells_of_another(error: BaseException) -> bool:
    return are_several() and (isinstance(error, distributed.DistError) or "gloo" in str(error))
