"""Which function of a model the kernels of a probe are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from turnrow.analysis.ntk import CausalLabelWords, CentroidHead, ClassifierHead, MaskedLabelWords, Outputs
from turnrow.errors import UserError
from turnrow.tasks import PromptTask, Task
from turnrow.training.base import Base, head_modules
from turnrow.training.probing.data import Sample

__all__ = ["Function", "function_of"]


@dataclass(frozen=True)
class Function:
    """A part of a model, and what its outputs are."""

    model: nn.Module
    """The part that the kernels are of."""
    strip: str
    """What the names of its modules begin with in the whole model."""
    words: str
    """What it is, for people."""
    fit: Callable[[Sample], Outputs]
    """The outputs, for a draw of training rows."""


def function_of(task: Task, base: Base) -> Function:
    """The function that fine-tuning on `task` starts from, or for a head that is new and random the nearest class centroid.

    Raises:
        UserError: the task or the model is of a kind whose kernels are not known.
    """
    model: Any = base.model
    if isinstance(task, PromptTask):
        causal = task.architecture == "causal"

        def words(sample: Sample) -> Outputs:
            ids = list(task.word_ids)
            return CausalLabelWords(ids) if causal else MaskedLabelWords(base.tokenizer.mask_token_id, ids)

        return Function(model, "", "logits of the label words", words)
    if task.name != "classification":
        raise UserError(
            f"a probe needs classes, and the task {task.name!r} has none that it knows; it knows 'classification' and 'prompt'"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"a probe knows encoders and decoders, and {type(model).__name__} is both; take another model")
    if not any(head in base.new_modules for head in head_modules(model, ())):
        return Function(model, "", "logits of the pretrained head", lambda sample: ClassifierHead())
    inner = model.base_model
    return Function(
        inner,
        f"{model.base_model_prefix}.",
        "nearest class centroid of mean states, for the head is new",
        lambda sample: CentroidHead.fit(inner, sample.batches, sample.classes.tolist()),
    )
