"""Classification of a text or a pair of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from turnrow.tasks.classes import ClassTask
from turnrow.tasks.sequence import SequenceTask

__all__ = ["ClassificationTask"]


@dataclass(kw_only=True)
class ClassificationTask(ClassTask, SequenceTask):
    """One of the labels that the training split has, for a text or a pair of texts; see `ClassTask`."""

    name: ClassVar[str] = "classification"
