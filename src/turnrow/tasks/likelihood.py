"""How likely a causal language model finds the tokens that it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnrow.tasks.padding import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["token_losses"]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label | the tokens before it), in nats; 0 where a label is ignored.

    Args:
        logits: of shape (rows, tokens, vocabulary).
        labels: of shape (rows, tokens); `IGNORED` where nothing is asked.

    Returns:
        Of shape (rows, tokens), float32. The first token of a row has nothing before it and counts 0.
    """
    import torch

    # Row by row: in float32, all of a batch may be many times the model's own logits.
    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="none")
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.nn.functional.pad(torch.stack(losses), (1, 0))
