"""What a classifier can tell by the directions of hidden states alone, and by their lengths alone.

The disentanglement experiment of RoAd's pilot study (Liao et al., NeurIPS 2024, arXiv:2409.00119, section 3). On the states x0 of a
frozen model stands a classifier of two layers. Its first layer, z = W^T x0, is the product of lengths and of the cosine of an angle,
so it can be asked to keep one of the two:

    ordinary     z_i = <W_:,i, x0>
    angle        z_i = cos(W_:,i, x0)
    magnitude    z_i = ||W_:,i|| ||x0||

The second layer is tanh and a linear layer with a bias, as in transformers' heads of RoBERTa. How well the three do against each
other, and against the ordinary one on a model that was never trained, says where a model keeps what it knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from turnrow.analysis.displacement.states import evaluating
from turnrow.analysis.displacement.tokens import real_tokens
from turnrow.errors import UserError, near_matches

__all__ = [
    "PARTS",
    "Disentangled",
    "DisentangledHead",
    "Labelled",
    "disentangle",
    "fit_head",
    "pool_states",
    "sentence_states",
]

Part = Literal["ordinary", "angle", "magnitude"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What the first layer keeps."""
Pooling = Literal["first", "last", "mean"]
Score = Callable[[Tensor, Tensor], float]
"""Predictions (n, outputs) and labels (n,) to a number; more is better."""

_SMALLEST = 1e-12
_WARM_UP = 0.1


@dataclass(frozen=True, eq=False)
class Labelled:
    """States of texts and what is to be told of them."""

    states: Tensor
    """x0, (n, d)."""
    labels: Tensor
    """(n,): int64 classes, or floating-point numbers."""


@dataclass(frozen=True)
class Disentangled:
    """What `disentangle` found for one part."""

    rates: dict[float, float]
    """Score on validation by learning rate, with the first seed."""
    learning_rate: float
    """The best of them."""
    scores: dict[int, float]
    """Score on the test split by seed."""


class DisentangledHead(nn.Module):
    """The classifier of two layers whose first one keeps angles, magnitudes, or both.

    Args:
        features: d.
        hidden: columns of W.
        outputs: classes, or 1 for a number.
        part: what the first layer keeps.
    """

    def __init__(self, features: int, hidden: int, outputs: int, part: Part) -> None:
        super().__init__()
        if part not in PARTS:
            raise UserError(f"part is {part!r}; it must be one of {', '.join(PARTS)}{near_matches(str(part), PARTS)}")
        self.part = part
        self.weight = nn.Parameter(torch.empty(hidden, features))  # W^T
        nn.init.uniform_(self.weight, -1 / math.sqrt(features), 1 / math.sqrt(features))
        self.out = nn.Linear(hidden, outputs)

    def first_layer(self, x: Tensor) -> Tensor:
        """z of states (n, d): (n, hidden)."""
        if self.part == "ordinary":
            return x @ self.weight.T
        widths, lengths = (torch.linalg.vector_norm(v, dim=-1).clamp(min=_SMALLEST) for v in (self.weight, x))
        if self.part == "magnitude":
            return lengths[:, None] * widths
        return (x / lengths[:, None]) @ (self.weight / widths[:, None]).T

    def forward(self, x: Tensor) -> Tensor:
        """States (n, d) to (n, outputs)."""
        return self.out(torch.tanh(self.first_layer(x)))


@torch.no_grad()
def sentence_states(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], pooling: Pooling = "first", layer: int = -1
) -> Tensor:
    """x0 of texts, (n, d) in the order of the batches: computed once, however many classifiers are trained on it.

    Args:
        model: frozen.
        batches: its inputs.
        pooling: as `pool_states` takes it.
        layer: which of the hidden states, 0 being the embeddings.

    Raises:
        UserError: no batches, another pooling, or a layer that is not there.
    """
    found = []
    with evaluating(model):
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states
            if not -len(states) <= layer < len(states):
                raise UserError(f"layer is {layer}, but there are hidden states 0 to {len(states) - 1}")
            found.append(pool_states(states[layer], batch, pooling))
    if not found:
        raise UserError("there are no texts: give at least one batch")
    return torch.cat(found)


def pool_states(states: Tensor, batch: Mapping[str, Tensor], pooling: Pooling = "first") -> Tensor:
    """One state a text, (B, d), of states (B, T, d).

    Args:
        states: hidden states of a layer.
        batch: the inputs that they are of, whose mask says what is padding.
        pooling: the state of the first token that is no padding, of the last one, or the mean over all.

    Raises:
        UserError: another pooling.
    """
    if pooling not in get_args(Pooling):
        hint = near_matches(str(pooling), get_args(Pooling))
        raise UserError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}{hint}")
    real = real_tokens(batch, (states.shape[0], states.shape[1])).to(states.device)
    if pooling == "mean":
        weights = real.to(states).unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1)
    number = real.cumsum(1) * real
    at = (number == 1).int().argmax(1) if pooling == "first" else number.argmax(1)
    return states[torch.arange(len(states), device=states.device), at]


def fit_head(
    data: Labelled,
    part: Part,
    *,
    learning_rate: float,
    hidden: int | None = None,
    epochs: int = 20,
    batch: int = 32,
    seed: int = 0,
) -> DisentangledHead:
    """Train a classifier on states, with AdamW, no weight decay, and a rate that warms up over a tenth and falls to zero.

    Args:
        data: states and labels; classes give a cross-entropy, numbers a squared error.
        part: what the first layer keeps.
        learning_rate: at its highest.
        hidden: columns of W; None takes as many as a state has features.
        epochs, batch, seed: of the training.
    """
    features, classes = data.states.shape[1], not data.labels.is_floating_point()
    outputs = int(data.labels.max()) + 1 if classes else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DisentangledHead(features, hidden or features, outputs, part)
    head.to(data.states)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(data.labels) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=generator).split(batch):
            predicted, labels = head(data.states[chosen]), data.labels[chosen]
            loss = (
                nn.functional.cross_entropy(predicted, labels)
                if classes
                else nn.functional.mse_loss(predicted[:, 0], labels.to(predicted.dtype))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


def disentangle(
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    part: Part,
    score: Score,
    *,
    rates: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    seeds: Sequence[int] = (0, 1, 2),
    **settings: Any,
) -> Disentangled:
    """How well one part does: the learning rate is the best on validation with the first seed, of equals the lower.

    Args:
        train, validation, test: the splits. The test split decides nothing.
        part: what the first layer keeps.
        score: of predictions, more is better.
        rates: learning rates to try.
        seeds: of the classifier and of the order of the batches.
        settings: further arguments of `fit_head`.
    """
    if not rates or not seeds:
        raise UserError("give at least one learning rate and one seed")
    heads = {rate: fit_head(train, part, learning_rate=rate, seed=seeds[0], **settings) for rate in rates}
    tried = {rate: _score(head, validation, score) for rate, head in heads.items()}
    learning_rate = max(tried, key=lambda rate: (tried[rate], -rate))
    scores = {seeds[0]: _score(heads[learning_rate], test, score)}
    for seed in seeds[1:]:
        scores[seed] = _score(fit_head(train, part, learning_rate=learning_rate, seed=seed, **settings), test, score)
    return Disentangled(tried, learning_rate, scores)


@torch.no_grad()
def _score(head: DisentangledHead, data: Labelled, score: Score) -> float:
    return score(head(data.states), data.labels)


def _rate(step: int, steps: int) -> float:
    warm_up = math.ceil(_WARM_UP * steps)
    return (step + 1) / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)
