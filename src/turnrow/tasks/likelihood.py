"""How likely a language model finds the tokens that it is shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.padding import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

__all__ = ["answer_losses", "finite_losses", "perplexity", "score_answers", "tell_answers", "token_losses"]


def token_losses(logits: Tensor, labels: Tensor, decoder: bool = True) -> Tensor:
    """Return -log p(label | the tokens before it), in nats; 0 where a label is ignored.

    Args:
        logits: of shape (rows, tokens, vocabulary). Of a decoder there may be more tokens than labels: virtual ones, which prompt tuning
            puts before the text, and of which nothing is asked.
        labels: of shape (rows, tokens); `IGNORED` where nothing is asked.
        decoder: whether the labels are the input itself, so that a token's logits foresee the next one; those of an
            encoder-decoder foresee the label at their own place.

    Returns:
        Of shape (rows, tokens), float32. The first token of a decoder's row has nothing before it and counts 0.
    """
    import torch

    if decoder:
        own = logits[:, -labels.shape[1] :]
        return torch.nn.functional.pad(token_losses(own[:, :-1], labels[:, 1:], decoder=False), (1, 0))
    # Row by row: in float32, all of a batch may be many times the model's own logits.
    losses = [
        torch.nn.functional.cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="none")
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses)


def answer_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor, decoder: bool = True) -> Tensor:
    """Return -log p of each row's labels, in nats, of shape (rows,); of several outputs the first are the logits."""
    return token_losses(logits[0] if isinstance(logits, tuple) else logits, labels, decoder).sum(dim=1)


def score_answers(losses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return `loss`, the mean of `answer_losses` over all tokens of `labels` that are learned, and its `perplexity`."""
    mean = float(finite_losses(losses, "rows").sum() / (np.asarray(labels) != IGNORED).sum())
    return {"perplexity": perplexity(mean), "loss": mean}


def tell_answers(losses: np.ndarray, encoded: Dataset) -> list[dict[str, Any]]:
    """Return per row of `encoded` the `perplexity` of its answers, and their `tokens`, from its `answer_losses`."""
    counts = [sum(label != IGNORED for label in row) for row in encoded["labels"]]
    return [
        {"perplexity": perplexity(loss / count), "tokens": count}
        for loss, count in zip(finite_losses(losses, "rows").tolist(), counts, strict=True)
    ]


def finite_losses(predictions: np.ndarray, what: str) -> np.ndarray:
    """Return losses as float64, or refuse them; `what` they are of, in the plural."""
    losses = np.asarray(predictions, dtype=np.float64)
    if bad := int((~np.isfinite(losses)).reshape(len(losses), -1).any(axis=1).sum()):
        raise UserError(
            f"{bad} of {len(losses)} {what} have a loss that is not finite: the model has diverged; train it with a lower "
            "learning rate"
        )
    return losses


def perplexity(loss: float) -> float:
    """The exponential of a mean loss in nats; infinite where that is no number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
