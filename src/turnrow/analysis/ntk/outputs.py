"""Outputs f for tangent kernels: from a model and a batch of B samples to (B, C), a number for each class.

They read token ids and positions from the batch and know no tasks. Each has a `cache_key` that names all it depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.analysis.ntk.factors import Batch, on_device_of, ready_for_gradients
from turnrow.analysis.ntk.terms import digest
from turnrow.errors import UserError

__all__ = ["CausalLabelWords", "CentroidHead", "ClassifierHead", "MaskedLabelWords", "mean_pooled"]

Words = Sequence[int | Sequence[int]]
"""For each class the token id of its label word, or several whose logits are averaged."""


@dataclass(frozen=True)
class MaskedLabelWords:
    """Logits of the label words at the mask of each sample, as in prompt-based fine-tuning (Gao et al., 2021, arXiv:2012.15723)."""

    mask_token_id: int
    words: Words

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, C).

        Raises:
            UserError: a sample has no mask token, or several.
        """
        is_mask = batch["input_ids"] == self.mask_token_id
        if bool((is_mask.sum(1) != 1).any()):
            sample = int((is_mask.sum(1) != 1).nonzero()[0])
            raise UserError(
                f"sample {sample} of a batch has {int(is_mask[sample].sum())} tokens {self.mask_token_id} (mask_token_id); it needs "
                "exactly one, where the label word belongs"
            )
        logits = _forward(model, batch).logits
        return _of_words(logits[is_mask], self.words)

    @property
    def cache_key(self) -> str:
        """Names all it depends on."""
        return f"masked {self.mask_token_id} {_plain(self.words)}"


@dataclass(frozen=True)
class CausalLabelWords:
    """Logits of the label words after the last real token of each sample; padding may be on either side."""

    words: Words

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, C)."""
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        places = torch.arange(ids.shape[1], device=ids.device)
        last = places[-1:].expand(len(ids)) if mask is None else (mask.ne(0) * places).argmax(dim=1)
        logits = _forward(model, batch).logits
        return _of_words(logits[torch.arange(len(ids), device=ids.device), last], self.words)

    @property
    def cache_key(self) -> str:
        """Names all it depends on."""
        return f"causal {_plain(self.words)}"


@dataclass(frozen=True)
class ClassifierHead:
    """The logits of a model for sequence classification."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, C)."""
        return _forward(model, batch).logits

    @property
    def cache_key(self) -> str:
        """Names all it depends on."""
        return "logits"


@dataclass(frozen=True, eq=False)
class CentroidHead:
    """``f_c(x) = mu_c . phi(x) - |mu_c|^2 / 2``, with phi the mean of the last hidden states over the real tokens.

    A linear classifier for an encoder that has none: its largest output is that of the nearest class centroid mu_c. Make it from
    training samples by `fit`; afterwards it is fixed, as a head that is not trained.
    """

    centroids: Tensor = field(repr=False)
    """mu, (C, d)."""

    @classmethod
    def fit(cls, model: nn.Module, batches: Iterable[Batch], labels: Sequence[int]) -> CentroidHead:
        """The centroids of some labelled samples.

        Args:
            model: returns `last_hidden_state`.
            batches: the samples.
            labels: the class, 0 .. C - 1, of every sample in order; each class must be among them.
        """
        with ready_for_gradients(model), torch.no_grad():
            phi = torch.cat([mean_pooled(model, on_device_of(model, batch)) for batch in batches])
        numbers = torch.as_tensor(labels, dtype=torch.int64, device=phi.device)
        if len(numbers) != len(phi):
            raise UserError(f"there are {len(numbers)} labels for {len(phi)} samples; give one for each")
        counts = torch.bincount(numbers)
        if bool((counts == 0).any()):
            missing = int((counts == 0).nonzero()[0])
            raise UserError(f"no sample has the label {missing}; labels must be 0 .. C - 1, each there at least once")
        sums = phi.new_zeros(len(counts), phi.shape[1]).index_add_(0, numbers, phi)
        return cls(sums / counts[:, None].to(phi.dtype))

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, C)."""
        phi = mean_pooled(model, batch)
        mu = self.centroids.to(phi)
        return phi @ mu.T - mu.square().sum(1) / 2

    @property
    def cache_key(self) -> str:
        """Names all it depends on."""
        return f"centroids {digest(self.centroids)}"


def mean_pooled(model: nn.Module, batch: Batch) -> Tensor:
    """phi, (B, d): the mean of the last hidden states over the tokens that `attention_mask` does not mark as padding."""
    states = _forward(model, batch).last_hidden_state
    mask = batch.get("attention_mask")
    weights = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def _forward(model: nn.Module, batch: Batch) -> Any:
    """Without labels, of which the model would only make a loss."""
    return model(**{name: value for name, value in batch.items() if name != "labels"})


def _of_words(logits: Tensor, words: Words) -> Tensor:
    return torch.stack([logits[:, [w] if isinstance(w, int) else list(w)].mean(1) for w in words], dim=1)


def _plain(words: Words) -> list[list[int]]:
    return [[w] if isinstance(w, int) else list(w) for w in words]
