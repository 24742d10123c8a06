"""How often a model says what it would say if a variable had the value that it has in the source, and maps trained for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.analysis.displacement.tokens import real_tokens
from turnrow.analysis.interchange.interchange import Batch, Interchange, SourceStates
from turnrow.errors import UserError

__all__ = ["Counterfactual", "align", "interchange_accuracy", "logits_of"]


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Base inputs, sources, and what the model should say of the base with the sources' part of its states."""

    base: Batch
    sources: tuple[Batch | SourceStates, ...]
    labels: Tensor
    """(B,) int64."""


Logits = Callable[[Any, Batch], Tensor]
"""Output of the model and inputs of the base to (B, classes)."""


def logits_of(output: Any, batch: Batch) -> Tensor:
    """What a model says of each text, (B, classes): its logits, of a language model those after the last token.

    Args:
        output: a tensor, or an output of transformers.
        batch: its inputs.
    """
    logits: Tensor = output if isinstance(output, Tensor) else output["logits"]
    if logits.ndim == 2:
        return logits
    real = real_tokens(batch, (logits.shape[0], logits.shape[1])).to(logits.device)
    last = (real.cumsum(1) * real).argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), last]


@torch.no_grad()
def interchange_accuracy(
    interchange: Interchange, cases: Iterable[Counterfactual], *, logits: Logits = logits_of
) -> float:
    """The share of texts for which the model, intervened on, says the counterfactual label (interchange intervention accuracy).

    Args:
        interchange: the interventions.
        cases: batches of them.
        logits: what the model says.

    Raises:
        UserError: there are no cases.
    """
    right = total = 0
    for case in cases:
        found = logits(interchange(case.base, *case.sources), case.base)
        right += int((found.argmax(-1) == case.labels.to(found.device)).sum())
        total += len(case.labels)
    if not total:
        raise UserError("there are no cases: give at least one batch")
    return right / total


def align(
    interchange: Interchange,
    cases: Sequence[Counterfactual],
    *,
    learning_rate: float = 1e-2,
    epochs: int = 10,
    logits: Logits = logits_of,
) -> list[float]:
    """Train the maps of an interchange, and nothing else, until its rows hold what the labels say: distributed alignment search.

    Adam on the cross-entropy of the counterfactual labels (Geiger et al., arXiv:2303.02536). The states of the sources are found once.

    Args:
        interchange: at least one of its maps has parameters, such as `Orthogonal` or `BlockRotation`.
        cases: batches of them.
        learning_rate: of Adam.
        epochs: passes over the cases, in their order.
        logits: what the model says.

    Returns:
        The mean loss of each epoch.

    Raises:
        UserError: there is nothing to train, or no cases.
    """
    trained = [parameter for parameter in interchange.maps.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("none of the maps has anything to train: take an Orthogonal or a BlockRotation")
    if not cases:
        raise UserError("there are no cases: give at least one batch")
    known = [
        Counterfactual(
            case.base,
            tuple(one if isinstance(one, SourceStates) else interchange.states_of(one) for one in case.sources),
            case.labels,
        )
        for case in cases
    ]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for case in known:
            # A parametrized map is made of its parameters once a step, not at each use.
            with nn.utils.parametrize.cached():
                found = logits(interchange(case.base, *case.sources), case.base)
                loss = nn.functional.cross_entropy(found, case.labels.to(found.device))
                gradients = torch.autograd.grad(loss, trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            total += loss.item() / len(known)
        losses.append(total)
    return losses
