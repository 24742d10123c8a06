"""Checkpoints that count only when they are whole.

Trainer writes a checkpoint file by file into its final place, so a killed process leaves a folder that looks like a
checkpoint and is none. Here each finished checkpoint gets a seal, ``complete.json`` with the size of every file, written
last; only a sealed checkpoint whose files still have these sizes is resumed from, and older ones are deleted only after
the newest is sealed. And a checkpoint at the end of an epoch holds the evaluation there, be it saved by steps or by epochs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from turnrow.errors import UserError
from turnrow.files import write_json
from turnrow.training.processes import wait_for_all

__all__ = [
    "SaveAfterEvaluation",
    "SealAndRotate",
    "check_processes",
    "discard_incomplete",
    "is_complete",
    "last_complete",
    "seal",
]

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class SealAndRotate(TrainerCallback):
    """Seals each checkpoint after Trainer has written it, then deletes the oldest ones.

    Args:
        keep: how many to keep; the newest and the best one always stay. None or 0 keeps all.
    """

    def __init__(self, keep: int | None) -> None:
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint just written, then delete old ones."""
        # Each process writes the state of its own random numbers; and none may end before the seal is set.
        wait_for_all()
        if args.should_save:
            self._seal_and_rotate(args, state)
        wait_for_all()

    def _seal_and_rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = Path(str(args.output_dir))
        newest = folder / f"checkpoint-{state.global_step}"
        seal(newest)
        if not self.keep:
            return
        protected = {newest.name, Path(state.best_model_checkpoint or newest).name}
        others = [path for path in _checkpoints(folder) if path.name not in protected]
        for path in others[: max(0, len(others) + len(protected) - self.keep)]:
            shutil.rmtree(path)


class SaveAfterEvaluation(TrainerCallback):
    """Puts off the checkpoint of an epoch's last step until the evaluation of that epoch is done.

    Trainer saves by steps before it evaluates by epochs. A run resumed from there would never make up for the evaluation, nor for
    what it draws from the random numbers, and so end otherwise. To be called after the callbacks that ask for checkpoints.
    """

    def __init__(self) -> None:
        self._put_off = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the wish for a checkpoint back, if the epoch ends here."""
        if control.should_save and not state.epoch % 1:
            self._put_off, control.should_save = True, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for it again."""
        if self._put_off:
            self._put_off, control.should_save = False, True


def seal(checkpoint: Path) -> None:
    """Record that every file of `checkpoint` is written."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL]
    for path in files:
        # The seal must not reach the disk before what it vouches for.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    write_json(checkpoint / SEAL, {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files})


def is_complete(checkpoint: Path) -> bool:
    """Whether `checkpoint` is sealed and all its files are there with the sizes that the seal names."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def last_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, or None."""
    return next((path for path in reversed(_checkpoints(folder)) if is_complete(path)), None)


def check_processes(checkpoint: Path, processes: int) -> None:
    """Refuse to go on from a checkpoint with another number of processes: the batches would be other ones.

    Raises:
        UserError: names both numbers.
    """
    # Trainer keeps the state of the random numbers in rng_state.pth, or of several processes in rng_state_0.pth and on.
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if before not in (0, processes):
        raise UserError(
            f"{checkpoint} was written by a run of {before} process{'es' * (before > 1)}, and this one has {processes}; go on "
            f"with `torchrun --standalone --nproc_per_node {before} -m turnrow train ... --resume`"
            + (" or, for one process, plain `turnrow train`" if before == 1 else "")
        )


def discard_incomplete(folder: Path) -> list[Path]:
    """Delete the checkpoints in `folder` that were cut short, and return them."""
    broken = [path for path in _checkpoints(folder) if not is_complete(path)]
    for path in broken:
        shutil.rmtree(path)
    return broken


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for match, path in sorted(named, key=lambda pair: int(pair[0][1]))]
