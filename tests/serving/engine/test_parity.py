"""Every request comes out as if it were served alone with its adapter merged: the law of this room."""

from __future__ import annotations

import copy
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.serving_models import alone, merged, model_of, prompt_of, write_adapter
from turnrow.serving import BASE, AdapterStore, Answer, Engine, Limits, Request, Sampling

GREEDY = Sampling(temperature=0)
_BYTES_PER_TOKEN = 2 * 2 * 2 * 4 * 4
"""Keys and values, in two layers, of two heads of four numbers in four bytes."""
ARCHITECTURES = ["llama", "qwen2", "gpt2"]


def store_of(model: Any, folders: dict[str, Path], **settings: Any) -> AdapterStore:
    store = AdapterStore(model, **settings)
    for name, folder in folders.items():
        store.add(name, folder, whole=False)
    return store


def check(architecture: str, folders: dict[str, Path], name: str, prompt: list[int], answer: Answer) -> None:
    tokens, logprobs = alone(merged(architecture, folders.get(name)), prompt, len(answer.token_ids))
    assert list(answer.token_ids) == tokens, name
    assert answer.logprobs is not None
    for place, one in enumerate(answer.logprobs):
        assert one.token_id == tokens[place]
        assert one.logprob == pytest.approx(logprobs[place, tokens[place]].item(), abs=1e-4)
        for token, logprob in one.top:
            assert logprob == pytest.approx(logprobs[place, token].item(), abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixture_of_all_methods_equals_each_request_alone(architecture, adapters, byte_tokenizer):
    model, folders = model_of(architecture), adapters(architecture)
    names = [*folders, BASE, "rows", "road1", "lora", "columns"]
    # prompts of 1 to 61 tokens, split: a step takes 24
    limits = Limits(max_running=len(names), batch_tokens=24, page_tokens=4, slots=16)
    prompts = [prompt_of(1 + 4 * i, i) for i in range(len(names))]
    with Engine(model, byte_tokenizer, store_of(model, folders), limits) as engine:
        handles = [
            engine.submit(Request(prompt, adapter=name, max_tokens=4 + i, sampling=GREEDY, logprobs=2))
            for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        ]
        answers = [handle.result(60)[0] for handle in handles]
        stats = engine.stats()
    assert stats.slots_filled == len(folders)
    assert stats.finished == {"length": len(names)}
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        check(architecture, folders, name, prompt, answer)
    # the test would say nothing if adapters made no difference
    texts = {tuple(alone(merged(architecture, folder), prompts[5], 8)[0]) for folder in [*folders.values(), None]}
    assert len(texts) > len(folders) // 2


def test_joins_cancels_and_evictions_in_mid_flight_change_nothing(adapters, byte_tokenizer):
    """Clients in four threads, more adapters than slots, some requests given up half way."""
    folders = adapters("llama")
    model, names = model_of("llama"), [*folders, BASE]
    # of weights in memory there is room for a few as well: the others are read from disk again and again
    store = store_of(model, folders, host_bytes=40_000)
    answered: list[tuple[str, list[int], Answer]] = []
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            order = random.Random(number)
            for turn in range(8):
                name, prompt = order.choice(names), prompt_of(order.randint(1, 40), 100 * number + turn)
                handle = engine.submit(
                    Request(prompt, adapter=name, max_tokens=order.randint(1, 12), sampling=GREEDY, logprobs=0)
                )
                if turn % 4 == 3:
                    next(iter(handle))
                    handle.cancel()
                    continue
                answered.append((name, prompt, handle.result(60)[0]))
        except BaseException as error:
            failures.append(error)

    limits = Limits(max_running=4, batch_tokens=16, page_tokens=4, slots=3)
    with Engine(model, byte_tokenizer, store, limits) as engine:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.drain(30)
        stats = engine.stats()
    store.close()
    assert not failures
    assert len(answered) == 24
    for name, prompt, answer in answered:
        check("llama", folders, name, prompt, answer)
    assert stats.running == stats.waiting == stats.slots_in_use == stats.cache_tokens_held == 0
    assert stats.adapters_put_in_slots > 3 < stats.store["loads"]
    assert stats.store["bytes_in_memory"] <= 40_000


def test_requests_set_back_for_want_of_memory_go_on_where_they_were(adapters, byte_tokenizer):
    folders = adapters("llama")
    model = model_of("llama")
    names = ["rows", "road1", "lora", "columns"]
    # 4 answers of 50 tokens ask for 200, and there are 96
    limits = Limits(max_running=4, batch_tokens=32, page_tokens=4, cache_bytes=24 * 4 * _BYTES_PER_TOKEN)
    with Engine(model, byte_tokenizer, store_of(model, folders), limits) as engine:
        prompts = [prompt_of(10, i) for i in range(4)]
        handles = [
            engine.submit(Request(prompt, adapter=name, max_tokens=40, sampling=GREEDY, logprobs=0))
            for name, prompt in zip(names, prompts, strict=True)
        ]
        answers = [handle.result(60)[0] for handle in handles]
        steps = engine.stats().steps
    assert steps > 50  # all at once would have been done in some 42
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        check("llama", folders, name, prompt, answer)


def test_an_adapter_on_the_head_equals_the_request_alone(tmp_path, byte_tokenizer):
    from peft import LoraConfig

    from turnrow import RoadConfig, RocoftConfig

    targets = ["lm_head", "q_proj"]
    configurations = {
        "rows": RocoftConfig(mode="row", r=3, target_modules=targets),
        "road": RoadConfig(variant="road_2", group_size=2, target_modules=targets),
        "lora": LoraConfig(r=2, target_modules=targets),
    }
    folders = {
        name: write_adapter("llama", config, tmp_path / name, seed=20 + seed)
        for seed, (name, config) in enumerate(configurations.items())
    }
    model = model_of("llama")
    prompts = [prompt_of(5 + 9 * i, 40 + i) for i in range(4)]
    with Engine(model, byte_tokenizer, store_of(model, folders), Limits(batch_tokens=32)) as engine:
        handles = [
            engine.submit(Request(prompt, adapter=name, max_tokens=6, sampling=GREEDY, logprobs=3))
            for name, prompt in zip([*folders, BASE], prompts, strict=True)
        ]
        answers = [handle.result(60)[0] for handle in handles]
    for name, prompt, answer in zip([*folders, BASE], prompts, answers, strict=True):
        check("llama", folders, name, prompt, answer)


def test_in_bfloat16_log_probabilities_are_those_of_the_merged_model_to_its_rounding(adapters, byte_tokenizer):
    folders = adapters("llama")
    model = model_of("llama").to(torch.bfloat16)
    prompt = prompt_of(20, 7)
    with Engine(model, byte_tokenizer, store_of(model, folders), Limits(batch_tokens=32)) as engine:
        handles = {
            name: engine.submit(Request(prompt, adapter=name, max_tokens=6, sampling=GREEDY, logprobs=0))
            for name in ("rows", "columns", "road1", "road4", "lora", "entries")
        }
        answers = {name: handle.result(60)[0] for name, handle in handles.items()}
    for name, answer in answers.items():
        # what the exact model would say of the same tokens
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer.token_ids]])
            exact = merged("llama", folders[name])(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            rounded = copy.deepcopy(merged("llama", folders[name])).to(torch.bfloat16)
            of_rounded = rounded(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        at = torch.tensor(answer.token_ids)
        own = torch.tensor([one.logprob for one in answer.logprobs or ()])
        rounding = (of_rounded - exact).gather(1, at[:, None]).abs().max().item()
        assert (own - exact.gather(1, at[:, None])[:, 0]).abs().max().item() < 3 * rounding, name
