"""AdaLoRA's budget: which singular values keep their rank is decided anew after every step (Zhang et al. 2023, algorithm 1)."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig, PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["AllocateRanks", "rank_allocation"]


class AllocateRanks(TrainerCallback):
    """Calls peft's allocator where it has to be called; without, AdaLoRA would keep its initial rank everywhere, silently."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the budget, while the gradients of the step are still there."""
        self._model.base_model.update_and_allocate(state.global_step)  # type: ignore[operator]


def rank_allocation(model: Any) -> list[AllocateRanks]:
    """The callback that the model's method needs, if it is AdaLoRA."""
    if isinstance(model, PeftModel) and isinstance(model.active_peft_config, AdaLoraConfig):
        return [AllocateRanks(model)]
    return []
