"""Ctrl-C while training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from turnrow.training.processes import any_process

__all__ = ["Interrupted", "StopOnInterrupt"]


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the text says where and how to go on."""


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into a checkpoint at the end of the step, followed by `Interrupted`.

    A second Ctrl-C stops at once, without a new checkpoint. Of several processes all stop after the same step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._stops = False
        """Whether one of the processes was asked; all of them agree on it."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT in this block, unless someone else does already or this is not the main thread."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint, if the user wants to stop."""
        self._stops = any_process(self._asked, args.device)
        # The last step of an epoch is followed by its evaluation; a checkpoint before that would lose it on resume.
        if self._stops and state.epoch % 1:
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint, if the user wants to stop."""
        self._stops = any_process(self._asked, args.device)
        if self._stops:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, now that the checkpoint is whole."""
        if self._stops:
            raise Interrupted(f"interrupted after step {state.global_step} of {state.max_steps}")
