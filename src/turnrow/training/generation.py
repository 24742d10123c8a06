"""Answers that the model writes: generation inside Trainer's evaluation loop, and the texts that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from turnrow.errors import UserError
from turnrow.tasks import tokenizer_of

__all__ = ["generate_batch", "texts"]

_PADDING = -100
"""What Trainer fills up predictions of unequal length with."""


def generate_batch(trainer: Trainer, model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> torch.Tensor:
    """Let the model go on with a batch.

    Args:
        trainer: prepares the inputs and knows the tokenizer.
        model: with `generate`.
        inputs: a batch of the collator; what is no input of an encoder or a decoder is left out.
        options: as of `Task.generation_options`.

    Returns:
        The new tokens, of shape (rows, longest answer), on the device of the model.

    Raises:
        UserError: options that only the model can tell to be wrong.
    """
    tokenizer: Any = tokenizer_of(trainer.processing_class)
    batch = {name: value for name, value in inputs.items() if name != "labels"}
    ready = trainer._prepare_inputs(batch)
    inner = trainer.accelerator.unwrap_model(model)
    settings = _settings(inner, tokenizer, options)
    with torch.no_grad(), trainer.autocast_smart_context_manager():
        # Processes that share a sharded model must all go on until the last one is done.
        together = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
        try:
            # The tokenizer finds the strings that end an answer.
            written = inner.generate(**ready, generation_config=settings, synced_gpus=together, tokenizer=tokenizer)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"the model cannot answer with task.generation: {dict(options)!r}: {' '.join(str(error).split())}"
            ) from error
    if not inner.config.is_encoder_decoder:
        written = written[:, ready["input_ids"].shape[1] :]
    return written.contiguous()


def texts(written: Any, preparer: Any) -> np.ndarray:
    """The texts of tokens as Trainer gathered them, of shape (rows,), without special tokens and outer blanks."""
    tokenizer: Any = tokenizer_of(preparer)
    ids = np.where(written == _PADDING, tokenizer.pad_token_id, written)
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return np.array([text.strip() for text in decoded], dtype=object)


def _settings(model: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> GenerationConfig:
    """Greedy, but for what `options` says: a base often comes with settings for conversations, which draw at random."""
    settings = GenerationConfig(**{"do_sample": False, "num_beams": 1, **options}, pad_token_id=tokenizer.pad_token_id)
    if settings.eos_token_id is None:
        ends = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
        settings.eos_token_id = list(dict.fromkeys(end for given in ends for end in _several(given))) or None
    return settings


def _several(end: int | list[int] | None) -> list[int]:
    return [] if end is None else end if isinstance(end, list) else [end]
