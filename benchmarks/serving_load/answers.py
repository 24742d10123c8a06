"""Are the answers those of the merged models? Every distinct pair of an adapter and a prompt is generated again, by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.methods import sharing_copy
from benchmarks.serving_load.asking import PROMPTS, Outcome
from turnrow.adapters import load_adapter

__all__ = ["Reference", "Verdict", "judge", "references"]

_TIE = 1e-3
"""Logits closer than this may change places by rounding."""


@dataclass(frozen=True)
class Reference:
    """What the merged model generates, greedily, as far as the longest request asks for it."""

    texts: Sequence[str]
    """The text of the first n + 1 tokens, n = 0, 1, ..."""
    gaps: Sequence[float]
    """How far the best logit lay above the second, by token."""
    ended: bool
    """The last token is the end of the sequence."""


@dataclass(frozen=True)
class Verdict:
    """How one answer compares."""

    is_right: bool
    is_tie: bool = False
    """It parts from the merged model where two tokens were equally likely."""
    expected: str = ""


@torch.no_grad()
def references(
    base: PreTrainedModel, tokenizer: Any, root: Path, outcomes: Iterable[Outcome]
) -> dict[tuple[str, int], Reference]:
    """Generate for every distinct (adapter, prompt) that was answered."""
    longest: dict[str, dict[int, int]] = {}
    for outcome in outcomes:
        ask = outcome.ask
        if outcome.status == 200 and not outcome.left:
            of_adapter = longest.setdefault(ask.adapter, {})
            of_adapter[ask.prompt] = max(ask.max_tokens, of_adapter.get(ask.prompt, 0))
    found = {}
    for adapter, of_adapter in longest.items():
        own = sharing_copy(base)
        for parameter in own.parameters():
            parameter.data = parameter.data.clone()
        model = load_adapter(own, root / adapter).merge_and_unload().eval()
        for prompt, tokens in of_adapter.items():
            found[adapter, prompt] = _generate(model, tokenizer, PROMPTS[prompt], tokens)
    return found


def _generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> Reference:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(result.logits).float().topk(2).values
    decode = lambda end: tokenizer.decode(result.sequences[0, :end], skip_special_tokens=True)  # noqa: E731
    length = ids.shape[1]
    before = decode(length)
    count = result.sequences.shape[1] - length
    texts = [decode(length + n + 1)[len(before) :].rstrip("\ufffd") for n in range(count)]
    ended = int(result.sequences[0, -1]) == model.generation_config.eos_token_id
    return Reference(texts, (top[:, 0] - top[:, 1]).tolist(), ended)


def judge(outcome: Outcome, reference: Reference) -> Verdict:
    """Compare text, number of tokens and reason of the end."""
    tokens = min(outcome.ask.max_tokens, len(reference.texts))
    ended = reference.ended and tokens == len(reference.texts)
    expected = reference.texts[tokens - 1]
    reason = "stop" if ended else "length"
    if (outcome.text, outcome.tokens, outcome.finish_reason) == (expected, tokens, reason):
        return Verdict(True)
    parts_at = next((n for n, text in enumerate(reference.texts) if not outcome.text.startswith(text)), tokens - 1)
    return Verdict(False, reference.gaps[parts_at] < _TIE, expected)
