"""What is used of transformers' continuous batching, pinned."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.serving.serving_models import alone, model_of, prompt_of
from turnrow.errors import UserError
from turnrow.serving.engine.attention import ATTENTION
from turnrow.serving.engine.continuous import ContinuousBatching, Sizes

_WINDOWS = "page_size" in inspect.signature(ContinuousBatchingConfig).parameters
"""Before the cache was rewritten, transformers' continuous batching went wrong over sliding windows (seen with its own `generate_batch`)."""

SIZES = Sizes(page_tokens=4, pages=64, batch_tokens=24)


@pytest.fixture
def continuous(llama) -> Any:
    running = ContinuousBatching(llama, SIZES)
    yield running
    running.close()


def greedy(continuous: ContinuousBatching, prompts: dict[str, list[int]], tokens: int) -> dict[str, list[int]]:
    """Answers by request; each is finished when it is as long as asked for."""
    found: dict[str, list[int]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        continuous.add(name, prompt)
    with torch.no_grad():
        while any(len(answer) < tokens for answer in found.values()):
            scheduled = continuous.prepare()
            if not scheduled:
                continue
            chosen = continuous.forward(scheduled).argmax(-1)
            continuous.commit(chosen)
            answering = [one.request_id for one in scheduled if one.has_logits]
            for name, token in zip(answering, chosen.tolist(), strict=True):
                found[name].append(token)
                if len(found[name]) == tokens:
                    continuous.finish(name)
    return found


def test_the_parts_of_transformers_that_are_used_are_there(continuous):
    processor, io = continuous._processor, continuous._processor.inputs_and_outputs
    assert list(inspect.signature(processor.prepare_next_batch).parameters) == []
    assert list(inspect.signature(processor.update_batch).parameters) == []
    assert list(inspect.signature(processor.scheduler.finish_request).parameters) == ["request_id"]
    assert processor.scheduler.block_new_requests is False
    assert [future.state.request_id for future in io.requests_in_batch] == ["trial"]  # of the start
    assert io.attention_mask is None  # nothing of the size queries x keys
    assert io.output_ids.shape == (1, 25)
    assert processor.cache.use_prefix_sharing is False
    assert processor.cache.num_blocks == 64
    update = inspect.signature(processor.cache.update).parameters
    assert {"read_index", "write_index"} <= set(update) or "kwargs" in update


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_packed_requests_equal_generate(architecture):
    model = model_of(architecture)
    prompts = {str(n): prompt_of(n, n) for n in (1, 3, 17, 30, 30)}
    running = ContinuousBatching(model, SIZES)
    found = greedy(running, prompts, 9)
    assert running.tokens_held == 0
    running.close()
    for name, prompt in prompts.items():
        assert found[name] == alone(model, prompt, 9)[0]


def test_a_sliding_window_equals_generate_or_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=64, sliding_window=8, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    reference = copy.deepcopy(model)
    prompts = {str(n): prompt_of(n, n + 50) for n in (2, 6, 20, 31)}
    prompts = {name: [token % 64 for token in prompt] for name, prompt in prompts.items()}
    if not _WINDOWS:
        with pytest.raises(UserError, match="has layers with a sliding window, over which continuous batching"):
            ContinuousBatching(model, SIZES)
        return
    running = ContinuousBatching(model, SIZES)
    found = greedy(running, prompts, 12)
    running.close()
    for name, prompt in prompts.items():
        assert found[name] == alone(reference, prompt, 12)[0]


def test_nan_in_one_request_reaches_no_other(continuous, llama):
    prompts = {"good": prompt_of(9, 1), "bad": [7, *prompt_of(8, 2)], "long": prompt_of(30, 3)}
    with torch.no_grad():
        llama.model.embed_tokens.weight[7] = float("nan")
    for prompt in prompts.values():
        prompt[1:] = [token if token != 7 else 8 for token in prompt[1:]]
    reference = model_of("llama")
    for name, prompt in prompts.items():
        continuous.add(name, prompt)
    finite: dict[str, bool] = {}
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    with torch.no_grad():
        for _ in range(8):
            scheduled = continuous.prepare()
            logits = continuous.forward(scheduled)
            answering = [one.request_id for one in scheduled if one.has_logits]
            chosen = logits.argmax(-1)
            for name, row, token in zip(answering, logits, chosen.tolist(), strict=True):
                finite[name] = finite.get(name, True) and bool(row.isfinite().all())
                answers[name].append(token)
            continuous.commit(chosen.masked_fill(chosen == 7, 8))
    assert finite == {"good": True, "bad": False, "long": True}
    for name in ("good", "long"):
        assert 7 not in answers[name]
        assert answers[name] == alone(reference, prompts[name], len(answers[name]))[0]


def test_the_model_is_given_back_as_it_was(llama):
    before = llama.config._attn_implementation
    expected = alone(llama, prompt_of(5, 1), 4)[0]
    running = ContinuousBatching(llama, SIZES)
    assert llama.config._attn_implementation == ATTENTION
    with pytest.raises(RuntimeError, match="this model is being served"):
        alone(llama, prompt_of(5, 1), 4)
    running.close()
    # transformers of 5.6 leaves "paged|sdpa" behind by itself
    assert llama.config._attn_implementation == before
    assert alone(llama, prompt_of(5, 1), 4)[0] == expected


def test_the_memory_of_the_cache_is_free_at_the_end_without_a_collection_of_garbage(llama, monkeypatch):
    running = ContinuousBatching(llama, SIZES)
    greedy(running, {"a": prompt_of(9, 1)}, 3)
    running.add("cut off", prompt_of(5, 2))
    with torch.no_grad():
        running.forward(running.prepare())
    processor = running._processor
    held = {"processor": processor, "cache": processor.cache, "in and out": processor.inputs_and_outputs}
    tensors = {
        name: value
        for owner in (processor.cache, processor.inputs_and_outputs)
        for name, value in _tensors(vars(owner))
        if value.device.type == "cpu"
    }
    assert sum(tensor.nbytes for tensor in tensors.values()) > 64 * 4 * 2 * 16  # keys and values of all pages, at least
    gone = {name: weakref.ref(value) for name, value in {**held, **tensors}.items()}
    collections: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *args: collections.append(1))
    enabled = gc.isenabled()
    gc.disable()
    try:
        del processor, held, tensors
        running.close()
        assert [name for name, reference in gone.items() if reference() is not None] == []
    finally:
        if enabled:
            gc.enable()
    assert collections == []


def _tensors(values: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Those in the fields of an object, and in lists of them."""
    found = []
    for name, value in values.items():
        each = value if isinstance(value, list) else [value]
        found += [(f"{name}/{place}", one) for place, one in enumerate(each) if isinstance(one, torch.Tensor)]
    return found


def test_models_that_cannot_be_served_are_refused():
    from transformers import FalconConfig, FalconForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    falcon = FalconForCausalLM(FalconConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    with pytest.raises(UserError, match="FalconForCausalLM"):
        ContinuousBatching(falcon, SIZES)
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, intermediate_size=24))
    with pytest.raises(UserError, match="Gemma2ForCausalLM caps the logits of attention"):
        ContinuousBatching(gemma, SIZES)
