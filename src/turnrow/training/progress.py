"""Progress bars of a run on stderr: one for the training steps with loss and metric, one for each evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["ProgressBars"]


class ProgressBars(TrainerCallback):
    """Replaces Trainer's own bars, which print every log entry as a dictionary.

    Args:
        main_metric: shown beside the loss after each evaluation.
        label: of the bar of an evaluation.
    """

    def __init__(self, main_metric: str, label: str) -> None:
        self._main_metric = main_metric
        self._label = label
        self._figures: dict[str, str] = {}
        self._train: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )

    def close(self) -> None:
        """Leave the terminal as it was, also after an exception."""
        self._progress.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar of the training steps."""
        self._train = self._progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, figures=""
        )
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance it."""
        if self._train is not None:
            self._progress.update(self._train, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest loss and metric beside it."""
        shown = {"loss": "loss", f"eval_{self._main_metric}": self._main_metric}
        self._figures |= {shown[key]: f"{value:.4f}" for key, value in (logs or {}).items() if key in shown}
        if self._train is not None:
            self._progress.update(self._train, figures="  ".join(f"{k} {v}" for k, v in self._figures.items()))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Show and advance the bar of an evaluation."""
        if self._evaluation is None:
            self._evaluation = self._progress.add_task(self._label, total=len(eval_dataloader), figures="")
            self._progress.start()
        self._progress.advance(self._evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the bar of the evaluation away."""
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Leave the bar as it ended."""
        self.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it ended."""
        self.close()
