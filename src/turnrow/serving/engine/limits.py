"""How much an engine may take on, and how much memory it takes for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from turnrow.errors import UserError
from turnrow.serving.engine.continuous import Sizes

__all__ = ["Limits"]

_SPARE_PAGES = 2
"""The oldest transformers takes a page more for a request than it needs, and one must be left to go on with."""


@dataclass(frozen=True)
class Limits:
    """Limits of an engine. The defaults suit a small model on a CPU: some 256 MiB for the cache of keys and values."""

    max_running: int = 32
    """Answers that are generated at once."""
    max_queue: int = 256
    """Answers that may wait beside; more are refused (`QueueFull`)."""
    slots: int = 64
    """Adapters on the device. Those of running requests stay, so that with fewer slots than `max_running` some requests may wait.
    A slot takes as much memory as the largest adapter of the kind, see `batch.tables`; it is taken as adapters come in."""
    batch_tokens: int = 512
    """The most tokens in a step. A long prompt is read in several steps, between which the others get their tokens."""
    cache_bytes: int | None = None
    """For keys and values. None for 256 MiB on a CPU, and elsewhere for 40 % of the memory that is free; in either case not
    more than `max_running` requests of the model's full length can use."""
    page_tokens: int = 16
    """Tokens for which a request gets memory at a time."""
    max_overtaken: int = 64
    """A request that waits for a slot lets so many later ones, whose adapters lie in slots, go first; then it is its turn."""
    max_length: int | None = None
    """The most tokens of a prompt and its answer together. None for as many as the model has positions for and the cache holds."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_queue", "slots", "batch_tokens", "page_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.batch_tokens < self.max_running:
            raise UserError(
                f"batch_tokens is {self.batch_tokens} and max_running {self.max_running}: a step must have room for a token of every "
                "running answer"
            )
        if self.page_tokens < 4 or self.page_tokens % 4:
            raise UserError(f"page_tokens is {self.page_tokens}; it must be a multiple of 4")

    def sizes(self, model: Any) -> Sizes:
        """What they mean for a model.

        Raises:
            UserError: the cache would hold less than two pages for every running answer.
        """
        each = _bytes_per_token(model) * self.page_tokens
        device = next(model.parameters()).device
        length = _positions(model)
        most = None if length is None else self.max_running * (-(-length // self.page_tokens) + 1) + _SPARE_PAGES
        pages = (_cache_bytes(device) if self.cache_bytes is None else self.cache_bytes) // each
        if most is not None:
            pages = min(pages, most)
        if pages < max(4, self.max_running):
            raise UserError(
                f"cache_bytes is {self.cache_bytes}, {pages} pages of {each:,} bytes; {max(4, self.max_running)} are needed at least"
            )
        return Sizes(self.page_tokens, pages, self.batch_tokens)

    def longest(self, model: Any, sizes: Sizes) -> int:
        """The most tokens of a prompt and its answer together."""
        held = sizes.cache_tokens - _SPARE_PAGES * sizes.page_tokens
        return min(held, _positions(model) or held, self.max_length or held)


def _bytes_per_token(model: Any) -> int:
    """Of keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


def _positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(0.4 * torch.cuda.mem_get_info(device)[0])
    return 256 * 1024**2
