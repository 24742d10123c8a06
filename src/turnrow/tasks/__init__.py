"""Data sets, encoding and metrics: everything about a task that needs neither a model nor a method."""

from turnrow.tasks.arithmetic import ArithmeticTask
from turnrow.tasks.catalog import CATALOG
from turnrow.tasks.choice import MultipleChoiceTask
from turnrow.tasks.classification import ClassificationTask
from turnrow.tasks.columns import plain_columns
from turnrow.tasks.extractive_qa import ExtractiveQATask
from turnrow.tasks.generation import GenerationTask
from turnrow.tasks.image_classification import ImageClassificationTask
from turnrow.tasks.images import need_pillow
from turnrow.tasks.instruction import InstructionTask
from turnrow.tasks.label_words import label_word_ids, label_word_logits
from turnrow.tasks.language_modelling import LanguageModellingTask
from turnrow.tasks.prompted import PromptTask
from turnrow.tasks.registry import TASKS, make_task, task_from_dict
from turnrow.tasks.regression import RegressionTask
from turnrow.tasks.sampling import FEW_SHOT_SEEDS, draw_few_shot
from turnrow.tasks.squad import best_threshold
from turnrow.tasks.summarization import SummarizationTask
from turnrow.tasks.tables import read_table, split_files
from turnrow.tasks.task import Task
from turnrow.tasks.tokens import ready_to_pad, resolve_max_length, tokenizer_of
from turnrow.tasks.visual_instruction import VisualInstructionTask

__all__ = [
    "CATALOG",
    "FEW_SHOT_SEEDS",
    "TASKS",
    "ArithmeticTask",
    "ClassificationTask",
    "ExtractiveQATask",
    "GenerationTask",
    "ImageClassificationTask",
    "InstructionTask",
    "LanguageModellingTask",
    "MultipleChoiceTask",
    "PromptTask",
    "RegressionTask",
    "SummarizationTask",
    "Task",
    "VisualInstructionTask",
    "best_threshold",
    "draw_few_shot",
    "label_word_ids",
    "label_word_logits",
    "make_task",
    "need_pillow",
    "plain_columns",
    "read_table",
    "ready_to_pad",
    "resolve_max_length",
    "split_files",
    "task_from_dict",
    "tokenizer_of",
]
