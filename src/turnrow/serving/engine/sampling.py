"""The next token of every request of a step, each by its own settings, from all their logits at once.

A draw takes one uniform number of the request's own stream, which depends on its seed and the place in the answer alone, and
looks up where it falls in the cumulated probabilities. So the same seed gives the same text in any company, as far as the
logits are the same to rounding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turnrow.serving.requests import Sampling, TokenLogprob

__all__ = ["Sampled", "TokenStream", "choose", "processed"]

_CANDIDATES = 256
"""So many of the most likely tokens are looked at first for top_p, before all are sorted."""


@dataclass(eq=False)
class TokenStream:
    """What of one answer the choice of its next token depends on."""

    settings: Sampling
    prompt_ids: Sequence[int]
    logprobs: int | None
    """As in a request."""
    place: int
    """Of the answer among the n of its request: each draws other numbers."""
    tokens: list[int] = field(default_factory=list)
    """Generated so far."""
    counts: dict[int, int] = field(default_factory=dict)
    """How often each was generated."""

    def __post_init__(self) -> None:
        seed = self.settings.seed
        self._random = random.Random() if seed is None else random.Random(f"{seed}/{self.place}")

    def draw(self) -> float:
        """The next number from [0, 1)."""
        return self._random.random()

    def append(self, token: int) -> None:
        """Take note of a token."""
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1


@dataclass(frozen=True, eq=False)
class Sampled:
    """The choices of a step."""

    tokens: Tensor
    """(n,) int64, on the device. Where logits were not finite, 0."""
    finite: list[bool]
    """Whether a request's logits hold no NaN and no infinity; -inf of single tokens is allowed."""
    logprobs: list[TokenLogprob | None]


@torch.no_grad()
def choose(logits: Tensor, streams: Sequence[TokenStream]) -> Sampled:
    """Choose the next tokens.

    Args:
        logits: (n, vocabulary) float32; left as they are.
        streams: of the n requests. Their draws are advanced, their tokens not.
    """
    best, tokens = logits.max(-1)  # NaN and inf are larger than any number
    finite = best.isfinite().tolist()
    usable = [row for row, good in enumerate(finite) if good]
    scores = processed(logits, streams, usable)
    if scores is not logits:
        tokens = scores.max(-1).indices
    drawn = [row for row in usable if streams[row].settings.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        own = scores if len(drawn) == len(streams) else scores.index_select(0, rows)
        chosen = _draw(own, [streams[row].settings for row in drawn], [streams[row].draw() for row in drawn])
        tokens = tokens.index_copy(0, rows, chosen)
    if len(usable) < len(streams):
        tokens = tokens.masked_fill(~torch.tensor(finite, device=tokens.device), 0)
    return Sampled(tokens, finite, _logprobs(logits, tokens, streams, finite))


def processed(logits: Tensor, streams: Sequence[TokenStream], rows: Sequence[int]) -> Tensor:
    """Logits after penalties and bias; the same tensor where no request of `rows` asks for any."""
    changed = [row for row in rows if _changes(streams[row].settings)]
    if not changed:
        return logits
    logits = logits.clone()
    device = logits.device
    for row in changed:  # only requests that ask for it come here, and each touches only the tokens it has seen
        stream, own = streams[row], logits[row]
        settings = stream.settings
        if settings.repetition_penalty != 1:
            seen = torch.tensor(sorted({*stream.prompt_ids, *stream.counts}), device=device)
            values = own[seen]
            factor = settings.repetition_penalty
            own[seen] = torch.where(values > 0, values / factor, values * factor)
        if stream.counts and (settings.presence_penalty or settings.frequency_penalty):
            seen = torch.tensor(list(stream.counts), device=device)
            often = torch.tensor(list(stream.counts.values()), dtype=own.dtype, device=device)
            own[seen] -= settings.presence_penalty + settings.frequency_penalty * often
        if settings.logit_bias:
            own[torch.tensor(list(settings.logit_bias), device=device)] += torch.tensor(
                list(settings.logit_bias.values()), dtype=own.dtype, device=device
            )
    return logits


def _changes(settings: Sampling) -> bool:
    penalties = settings.presence_penalty or settings.frequency_penalty or settings.repetition_penalty != 1
    return bool(penalties or settings.logit_bias)


def _draw(scores: Tensor, settings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """(n,) tokens at the places of the uniform numbers in the cumulated probabilities of what is kept."""
    of = lambda name, dtype: torch.tensor([getattr(one, name) for one in settings], dtype=dtype, device=scores.device)  # noqa: E731
    scores = scores / of("temperature", torch.float32).unsqueeze(1)
    kept = _kept(scores, settings)
    if kept is not None:
        scores = scores.masked_fill(~kept, float("-inf"))
    # cumulated in float64: the sum over a large vocabulary in float32 would be as coarse as its rare tokens
    cumulated = scores.softmax(-1, dtype=torch.float64).cumsum_(-1)
    u = torch.tensor(uniform, dtype=torch.float64, device=scores.device).unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, u, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)


def _kept(scores: Tensor, settings: Sequence[Sampling]) -> Tensor | None:
    """(n, vocabulary) bool, the tokens that top_k, top_p and min_p leave, one after the other; None for all."""
    vocabulary = scores.shape[1]
    limited = [i for i, one in enumerate(settings) if 0 < one.top_k < vocabulary or one.top_p < 1 or one.min_p > 0]
    if not limited:
        return None
    kept = torch.ones_like(scores, dtype=torch.bool)
    rows = torch.tensor(limited, device=scores.device)
    kept[rows] = _limits(scores[rows], [settings[i] for i in limited])
    return kept


def _limits(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    vocabulary, device = scores.shape[1], scores.device
    top_k = torch.tensor([one.top_k or vocabulary for one in settings], device=device).clamp(max=vocabulary)
    top_p = torch.tensor([one.top_p for one in settings], device=device, dtype=torch.float64)
    min_p = torch.tensor([one.min_p for one in settings], device=device, dtype=torch.float64)
    count = min(vocabulary, max(_CANDIDATES, max(one.top_k for one in settings)))
    while True:
        values, tokens = scores.topk(count, dim=-1)
        inside = torch.arange(count, device=device) < top_k.unsqueeze(1)
        # probabilities among the top k, or among all
        among_all = scores.logsumexp(-1, keepdim=True)
        among_top = values.masked_fill(~inside, float("-inf")).logsumexp(-1, keepdim=True)
        total = torch.where((top_k < vocabulary).unsqueeze(1), among_top, among_all)
        probability = (values - total).double().exp().masked_fill(~inside, 0)
        before = probability.cumsum(-1) - probability
        # all sorted, or as many as any request can keep
        enough = (
            (top_k <= count)
            | (before[:, -1] >= top_p)
            | (top_p >= 1) & (probability[:, -1] < min_p * probability[:, 0])
        )
        if count == vocabulary or bool(enough.all()):
            break
        count = vocabulary
    inside &= before < top_p.unsqueeze(1)
    inside &= probability >= min_p.unsqueeze(1) * probability[:, :1]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, tokens, inside)


def _logprobs(
    logits: Tensor, tokens: Tensor, streams: Sequence[TokenStream], finite: Sequence[bool]
) -> list[TokenLogprob | None]:
    asked = [row for row, stream in enumerate(streams) if stream.logprobs is not None and finite[row]]
    found: list[TokenLogprob | None] = [None] * len(streams)
    if not asked:
        return found
    rows = torch.tensor(asked, device=logits.device)
    all_of = logits.index_select(0, rows).log_softmax(-1)
    chosen = tokens.index_select(0, rows)
    own = all_of.gather(1, chosen.unsqueeze(1)).squeeze(1).tolist()
    most = max(streams[row].logprobs or 0 for row in asked)
    values, which = (
        (t.tolist() for t in all_of.topk(min(most, logits.shape[1]), dim=-1)) if most else ([[]] * len(asked),) * 2
    )
    for i, (row, token) in enumerate(zip(asked, chosen.tolist(), strict=True)):
        count = streams[row].logprobs or 0
        top = tuple(zip(which[i][:count], values[i][:count], strict=True))
        found[row] = TokenLogprob(token, own[i], top)
    return found
