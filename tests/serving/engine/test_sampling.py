"""How the next token is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turnrow.serving import Sampling
from turnrow.serving.engine.sampling import TokenStream, _kept, choose, processed

VOCABULARY = 50


def stream(logprobs: int | None = None, prompt=(), place: int = 0, **settings) -> TokenStream:
    return TokenStream(Sampling(**settings), list(prompt), logprobs, place)


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_is_the_largest_logit():
    logits = logits_of(3)
    assert torch.equal(choose(logits, [stream(temperature=0)] * 3).tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.6},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "temperature": 0.5},
        {"top_p": 0.999, "temperature": 3},
        {"top_k": 1},
    ],
)
@pytest.mark.parametrize("candidates", [4, 256])
def test_what_is_kept_is_what_transformers_keeps(settings, candidates, monkeypatch):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    monkeypatch.setattr("turnrow.serving.engine.sampling._CANDIDATES", candidates)
    scores = logits_of(4) / settings.get("temperature", 1)
    expected = scores
    if "top_k" in settings:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    if "min_p" in settings:
        expected = MinPLogitsWarper(settings["min_p"])(None, expected)
    # beside requests with other limits, and with none
    others = [Sampling(), Sampling(top_k=3), Sampling(top_p=0.2), Sampling(min_p=0.5)]
    for row in range(4):
        batch = [*others[:row], Sampling(**settings), *others[row + 1 :]]
        kept = _kept(scores, batch)
        assert kept is not None
        assert torch.equal(kept[row], expected[row] > -math.inf)


def test_penalties_are_those_that_openai_describes():
    """mu[j] - c[j] alpha_frequency - float(c[j] > 0) alpha_presence, of what was generated."""
    logits = logits_of(2)
    one = stream(prompt=[9], presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 7.0})
    for token in (4, 4, 6):
        one.append(token)
    expected = logits.clone()
    expected[0, 4] -= 0.5 + 2 * 0.25
    expected[0, 6] -= 0.5 + 0.25
    expected[0, 3] += 7
    torch.testing.assert_close(processed(logits, [one, stream()], [0, 1]), expected)


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = logits_of(1)
    one = stream(prompt=[1, 2, 3], repetition_penalty=1.7)
    one.append(5)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 5]]), logits.clone())
    torch.testing.assert_close(processed(logits, [one], [0]), expected)


def test_without_settings_nothing_is_copied():
    logits = logits_of(2)
    assert processed(logits, [stream(), stream(temperature=0)], [0, 1]) is logits


def test_draws_follow_the_probabilities():
    logits = logits_of(1)[:, :6].repeat(4000, 1)
    settings = Sampling(temperature=2, top_k=4)
    expected = torch.where(_kept(logits[:1] / 2, [settings]), logits[:1] / 2, -math.inf).softmax(-1)[0]
    streams = [TokenStream(settings, [], None, place) for place in range(4000)]
    for one in streams:
        one._random.seed(one.place)
    counts = choose(logits, streams).tokens.bincount(minlength=6) / 4000
    assert (counts - expected).abs().max() < 0.03  # four standard deviations
    assert counts[expected == 0].sum() == 0


def test_a_seed_gives_the_same_tokens_in_any_company():
    logits = logits_of(8)

    def tokens(company: int, at: int) -> list[int]:
        mine = stream(seed=11, temperature=0.9, top_p=0.9)
        others = [stream(seed=100 + i, top_k=3) if i % 2 else stream(temperature=0) for i in range(company)]
        batch = [*others[:at], mine, *others[at:]]
        found = []
        for step in range(8):
            rows = logits_of(company + 1, seed=step)
            rows[at] = logits[step]
            found.append(int(choose(rows, batch).tokens[at]))
        return found

    assert tokens(0, 0) == tokens(5, 2) == tokens(7, 7)
    assert len(set(tokens(0, 0))) > 1


def test_answers_of_one_request_draw_different_numbers():
    assert len({stream(seed=3, place=place).draw() for place in range(4)}) == 4


def test_logprobs_are_those_of_the_model_before_any_setting():
    logits = logits_of(3)
    batch = [
        stream(logprobs=2, temperature=0.3, top_k=1, logit_bias={7: 100}),
        stream(),
        stream(logprobs=0, temperature=0),
    ]
    sampled = choose(logits, batch)
    expected = logits.log_softmax(-1)
    first, none, last = sampled.logprobs
    assert none is None
    assert first is not None
    assert last is not None
    assert (first.token_id, last.token_id) == (7, int(logits[2].argmax()))
    assert first.logprob == pytest.approx(expected[0, 7].item())
    assert [token for token, _ in first.top] == logits[0].topk(2).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected[0].topk(2).values.tolist())
    assert last.top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told_of_their_request_alone(bad):
    logits = logits_of(3)
    logits[1, 5] = bad
    logits[2, 5] = -math.inf  # as some models mask tokens
    sampled = choose(logits, [stream(logprobs=1, temperature=0), stream(logprobs=1), stream(logprobs=1, seed=1)])
    assert sampled.finite == [True, False, True]
    assert sampled.tokens[1] == 0
    assert sampled.logprobs[1] is None
    assert sampled.tokens[0] == logits[0].argmax()
