"""The kinds of task, and tasks by the name of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turnrow.errors import UserError, near_matches
from turnrow.tasks.arithmetic import ArithmeticTask
from turnrow.tasks.catalog import CATALOG
from turnrow.tasks.choice import MultipleChoiceTask
from turnrow.tasks.classification import ClassificationTask
from turnrow.tasks.extractive_qa import ExtractiveQATask
from turnrow.tasks.image_classification import ImageClassificationTask
from turnrow.tasks.instruction import InstructionTask
from turnrow.tasks.language_modelling import LanguageModellingTask
from turnrow.tasks.prompted import PromptTask
from turnrow.tasks.regression import RegressionTask
from turnrow.tasks.summarization import SummarizationTask
from turnrow.tasks.task import Task
from turnrow.tasks.visual_instruction import VisualInstructionTask

__all__ = ["TASKS", "make_task", "task_from_dict"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        ClassificationTask,
        RegressionTask,
        PromptTask,
        ExtractiveQATask,
        MultipleChoiceTask,
        ArithmeticTask,
        SummarizationTask,
        InstructionTask,
        LanguageModellingTask,
        ImageClassificationTask,
        VisualInstructionTask,
    )
}
"""The class of each kind of task by the name that recipes use."""


def make_task(name: str, **options: Any) -> Task:
    """Make a task from the `task:` block of a recipe.

    Args:
        name: a kind of task (`TASKS`), or a data set (`CATALOG`), which is a kind with options.
        options: the fields of that class, e.g. `text`, `label` and `metric`; of a data set, those that differ.

    Raises:
        UserError: the name or an option is unknown, an option is missing, or its value is wrong.
    """
    entry = CATALOG.get(name)
    if entry is None:
        return _task_class(name).from_options(options)
    given = {**entry.task, **options}
    task = _task_class(given.pop("name")).from_options(given)
    task.dataset = entry.name
    return task


def task_from_dict(saved: Mapping[str, Any]) -> Task:
    """Make the task that `Task.to_dict` described, with what it had learned.

    Raises:
        UserError: the description is broken, or was written by a later version of turnrow.
    """
    return _task_class(saved.get("name")).from_dict(saved)


def _task_class(name: object) -> type[Task]:
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(
            f"unknown task {name!r}; tasks are {', '.join(TASKS)}, and the data sets that `turnrow tasks` lists"
            f"{near_matches(str(name), [*TASKS, *CATALOG])}"
        )
    return TASKS[name]
