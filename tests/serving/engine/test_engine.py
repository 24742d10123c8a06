"""The engine under stress: full queues, deadlines, cancels, poison, drains, break-downs."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.holding import Gate, eventually
from tests.serving.serving_models import alone, configurations, merged, model_of, prompt_of, write_adapter
from turnrow.errors import UserError
from turnrow.serving import BASE, AdapterStore, Engine, Event, Limits, QueueFull, Request, RequestFailed, Sampling

GREEDY = Sampling(temperature=0)
PROMPT = prompt_of(6, 3)
START = Callable[..., Engine]


@pytest.fixture
def start(byte_tokenizer, adapters) -> Iterator[START]:
    """`start(limits, names=(...))`: a running engine of the tiny Llama with some of its adapters."""
    engines = []

    def start(names=(), root: Path | None = None, **limits: Any) -> Engine:
        model = model_of("llama")
        store = AdapterStore(model, root)
        for name in names:
            store.add(name, adapters("llama")[name])
        limits.setdefault("batch_tokens", 32)
        engines.append(Engine(model, byte_tokenizer, store, Limits(**limits)).start())
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()
        engine.store.close()


def failure_of(handle) -> RequestFailed:
    with pytest.raises(RequestFailed) as failure:
        handle.result(20)
    return failure.value


def test_a_full_queue_refuses_with_a_hint_and_loses_nothing(start):
    engine = start(max_running=2, max_queue=3)
    gate = Gate(engine)
    handles = [engine.submit(Request(PROMPT, max_tokens=3, sampling=GREEDY)) for _ in range(2)]
    assert gate.waits.wait(20)
    eventually(lambda: engine.stats().waiting < 2)
    room = 3 - engine.stats().waiting
    handles += [engine.submit(Request(PROMPT, max_tokens=3, sampling=GREEDY)) for _ in range(room)]
    with pytest.raises(QueueFull, match="3 requests wait already") as full:
        engine.submit(Request(PROMPT))
    assert full.value.retry_after >= 1
    gate.open()
    expected = tuple(alone(merged("llama", None), PROMPT, 3)[0])
    assert {handle.result(20)[0].token_ids for handle in handles} == {expected}
    assert engine.submit(Request(PROMPT, max_tokens=1)).result(20)


def test_requests_that_the_model_cannot_serve_are_refused(start):
    engine = start(names=["rows"], max_queue=4)
    with pytest.raises(UserError, match="the prompt has 100 tokens and max_tokens is 60; together they may be 128"):
        engine.submit(Request(prompt_of(100, 1), max_tokens=60))
    with pytest.raises(UserError, match="the prompt has the token 300; the model's are 0 to 299"):
        engine.submit(Request([1, 300]))
    with pytest.raises(UserError, match="logit_bias has the token 999"):
        engine.submit(Request([1], sampling=Sampling(logit_bias={999: 1})))
    with pytest.raises(UserError, match="no adapter is called 'row'; did you mean 'rows'"):
        engine.submit(Request([1], adapter="row"))
    with pytest.raises(UserError, match="n is 5; this server takes up to 4 answers"):
        engine.submit(Request([1], n=5))
    assert engine.stats().waiting == 0


def test_a_cancel_frees_its_place_before_the_next_step(start):
    engine = start(names=["rows"], max_running=1, slots=1)
    long = engine.submit(Request(PROMPT, adapter="rows", max_tokens=120, sampling=GREEDY))
    events = iter(long)
    next(events)
    waiting = engine.submit(Request(PROMPT, max_tokens=2, sampling=GREEDY))
    long.cancel()
    long.cancel()
    assert failure_of(long).kind == "cancelled"
    assert len(waiting.result(20)[0].token_ids) == 2
    eventually(lambda: engine.stats().running == 0)
    stats = engine.stats()
    assert stats.finished == {"cancelled": 1, "length": 1}
    assert stats.slots_in_use == stats.cache_tokens_held == stats.running == 0
    assert stats.generated_tokens < 100


def test_a_waiting_request_is_cancelled_without_having_run(start):
    engine = start(max_running=1)
    gate = Gate(engine)
    first = engine.submit(Request(PROMPT, max_tokens=2, sampling=GREEDY))
    assert gate.waits.wait(20)
    second = engine.submit(Request(PROMPT, n=3, max_tokens=2))
    second.cancel()
    assert failure_of(second).kind == "cancelled"  # told at once, while the step still runs
    gate.open()
    first.result(20)
    eventually(lambda: engine.stats().waiting == 0)
    assert engine.stats().generated_tokens == 2


def test_a_deadline_ends_what_runs_and_what_waits(start):
    engine = start(max_running=1)
    gate = Gate(engine)
    running = engine.submit(Request(PROMPT, max_tokens=100, timeout_s=0.05))
    waiting = engine.submit(Request(PROMPT, max_tokens=100, timeout_s=0.05))
    assert gate.waits.wait(20)
    time.sleep(0.06)
    gate.open()
    for handle in (running, waiting):
        failure = failure_of(handle)
        assert failure.kind == "timeout"
        assert "was not done within 0.05 s" in str(failure)
    assert engine.submit(Request(PROMPT, max_tokens=2, timeout_s=20)).result(20)
    # also with nothing else to wake the engine
    handle = engine.submit(Request(PROMPT, max_tokens=1, timeout_s=20))
    assert handle.result(20)


@pytest.mark.parametrize("method", ["rows", "columns", "lora", "road1"])
def test_a_poisoned_adapter_fails_its_own_requests_alone(method, adapters, byte_tokenizer, tmp_path):
    """Its values are finite, so that no check of the file finds them, and what they make of a token is not."""
    model = model_of("llama")
    store = AdapterStore(model)
    folders = {name: adapters("llama")[name] for name in ("rows", "columns", "lora", "road1")}
    for name, folder in folders.items():
        store.add(name, folder)
    store.add("poison", write_adapter("llama", configurations("llama")[method], tmp_path / "p", seed=1, size=1e37))
    limits = Limits(max_running=8, batch_tokens=16)
    prompts = [prompt_of(4 + 9 * i, i) for i in range(5)]
    with Engine(model, byte_tokenizer, store, limits) as engine:
        bad = [engine.submit(Request(prompt, adapter="poison", max_tokens=10, n=2)) for prompt in prompts[:2]]
        good = [
            engine.submit(Request(prompt, adapter=name, max_tokens=10, sampling=GREEDY))
            for name, prompt in zip([*folders, BASE], prompts, strict=True)
        ]
        for handle in bad:
            failure = failure_of(handle)
            assert failure.kind == "not_finite"
            assert "adapter 'poison' made the model compute NaN or infinite logits" in str(failure)
        for name, prompt, handle in zip([*folders, BASE], prompts, good, strict=True):
            expected = alone(merged("llama", folders.get(name)), prompt, 10)[0]
            assert list(handle.result(20)[0].token_ids) == expected
        eventually(lambda: engine.stats().slots_in_use == 0)


def test_a_drain_ends_what_was_accepted_and_takes_no_more(start):
    engine = start(max_running=2)
    handles = [engine.submit(Request(PROMPT, max_tokens=20)) for _ in range(6)]
    gate = Gate(engine)
    assert not engine.drain(0.01)
    with pytest.raises(RequestFailed, match="the engine is draining and takes no requests"):
        engine.submit(Request(PROMPT))
    gate.open()
    assert engine.drain(20)
    assert all(handle.done and handle.error is None for handle in handles)
    assert engine.stats().state == "draining"


def test_a_stop_fails_what_is_left_and_gives_the_model_back(start):
    engine = start(names=["rows"], max_running=1)
    handles = [engine.submit(Request(PROMPT, adapter="rows", max_tokens=120)) for _ in range(3)]
    next(iter(handles[0]))
    engine.stop()
    engine.stop()
    assert {failure_of(handle).kind for handle in handles} == {"stopped"}
    with pytest.raises(RequestFailed, match="the engine is stopped"):
        engine.submit(Request(PROMPT))
    assert alone(engine.model, PROMPT, 5)[0] == alone(merged("llama", None), PROMPT, 5)[0]
    with pytest.raises(UserError, match="the engine was started before"):
        engine.start()


def test_a_stop_between_two_rounds_is_not_slept_through(start):
    engine = start()
    ledger = engine._ledger
    asleep, waits = threading.Event(), []
    clear, wait = ledger.wake.clear, ledger.wake.wait

    def clear_late() -> None:
        if (
            asleep.is_set() and ledger.state == "running"
        ):  # between the look at the state and this, the engine is stopped
            ledger.change("stopped", of=("running",))
        clear()

    def noting(timeout: float | None = None) -> bool:
        waits.append(ledger.state)
        asleep.set()
        return wait(timeout)

    ledger.wake.clear, ledger.wake.wait = clear_late, noting
    ledger.wake.set()
    assert asleep.wait(20)
    ledger.wake.set()
    engine._thread.join(20)
    assert "stopped" not in waits


def test_a_break_down_leaves_nobody_waiting(start):
    engine = start(max_running=1)
    assert engine._continuous is not None
    accepted = threading.Event()

    def fail(*args: Any) -> None:
        assert accepted.wait(20)
        raise MemoryError("no memory for this step")

    engine._continuous.forward = fail  # type: ignore[assignment,method-assign]
    handles = [engine.submit(Request(PROMPT, max_tokens=20)) for _ in range(3)]
    accepted.set()
    for handle in handles:
        failure = failure_of(handle)
        assert failure.kind == "engine"
        assert "the engine broke down: MemoryError: no memory for this step" in str(failure)
    eventually(lambda: engine.stats().state == "broken")
    with pytest.raises(RequestFailed, match="the engine broke down"):
        engine.submit(Request(PROMPT))
    assert engine.drain(5)


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests(start, adapters, tmp_path):
    engine = start(names=["rows"])
    folder = shutil.copytree(adapters("llama")["lora"], tmp_path / "lora")
    engine.store.add("broken", folder, whole=False)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    bad = engine.submit(Request(PROMPT, adapter="broken", n=2))
    good = engine.submit(Request(PROMPT, adapter="rows", max_tokens=4))
    failure = failure_of(bad)
    assert failure.kind == "adapter"
    assert "was altered" in str(failure)
    assert good.result(20)


def test_a_request_keeps_the_version_that_it_began_with(start, adapters, tmp_path):
    folder = shutil.copytree(adapters("llama")["rows"], tmp_path / "adapter")
    old = merged("llama", adapters("llama")["rows"])
    engine = start(max_running=2, slots=4)
    engine.store.add("mine", folder)
    running = engine.submit(Request(PROMPT, adapter="mine", max_tokens=60, sampling=GREEDY))
    next(iter(running))
    gate = Gate(engine)
    shutil.rmtree(folder)
    write_adapter("llama", configurations("llama")["road1"], folder, seed=31)
    engine.store.reload("mine")
    late = engine.submit(Request(PROMPT, adapter="mine", max_tokens=20, sampling=GREEDY))
    gate.open()
    first, second = running, late.result(20)[0]
    tokens = [token for event in first for token in event.token_ids]
    assert tokens == alone(old, PROMPT, 60)[0][1:]
    assert list(second.token_ids) == alone(merged("llama", folder), PROMPT, 20)[0]
    assert (running.adapter_version, late.adapter_version) == (1, 2)
    assert engine.stats().slots_filled == 1  # the old version left its slot with its last request


def test_all_answers_of_a_request_are_of_one_version(start, adapters, tmp_path):
    folder = shutil.copytree(adapters("llama")["rows"], tmp_path / "adapter")
    engine = start(max_running=1)
    engine.store.add("mine", folder)
    handle = engine.submit(Request(PROMPT, adapter="mine", n=3, max_tokens=8, sampling=GREEDY))
    events = iter(handle)
    next(events)
    gate = Gate(engine)
    shutil.rmtree(folder)
    write_adapter("llama", configurations("llama")["road1"], folder, seed=31)
    engine.store.reload("mine")
    gate.open()
    tokens: dict[int, list[int]] = {1: [], 2: []}
    for event in events:
        if event.index:
            tokens[event.index] += event.token_ids
    expected = alone(merged("llama", adapters("llama")["rows"]), PROMPT, 8)[0]
    assert tokens == {1: expected, 2: expected}
    eventually(lambda: engine.stats().slots_filled == 0)


def test_an_unloaded_adapter_serves_what_was_accepted_and_no_more(start):
    engine = start(names=["rows"], max_running=1)
    gate = Gate(engine)
    accepted = [engine.submit(Request(PROMPT, adapter="rows", max_tokens=5, sampling=GREEDY)) for _ in range(2)]
    assert gate.waits.wait(20)
    engine.store.remove("rows")
    with pytest.raises(UserError, match="no adapter is called 'rows'"):
        engine.submit(Request(PROMPT, adapter="rows"))
    gate.open()
    assert len({handle.result(20)[0].token_ids for handle in accepted}) == 1
    eventually(lambda: engine.stats().slots_filled == 0)


def test_one_without_a_slot_is_not_overtaken_for_ever(start):
    engine = start(names=["rows", "lora"], max_running=2, slots=1, max_overtaken=3, max_queue=64)
    gate = Gate(engine)
    first = engine.submit(Request(PROMPT, adapter="rows", max_tokens=3))
    assert gate.waits.wait(20)
    other = engine.submit(Request(PROMPT, adapter="lora", max_tokens=3))
    later = [engine.submit(Request(PROMPT, adapter="rows", max_tokens=3)) for _ in range(12)]
    ended: list[str] = []
    for name, handle in [("other", other), *((f"later {i}", one) for i, one in enumerate(later))]:
        handle.put = _noting(handle.put, name, ended)
    gate.open()
    for handle in (first, other, *later):
        handle.result(20)
    assert ended[:4] == ["later 0", "later 1", "later 2", "other"]


def _noting(put: Callable[[Event], None], name: str, ended: list[str]) -> Callable[[Event], None]:
    """`put`, which notes the name of a request when it ends."""

    def noting(event: Event) -> None:
        if event.finish_reason is not None:
            ended.append(name)
        put(event)

    return noting


def test_a_request_ends_with_its_stop_string_or_its_end_token(start, byte_tokenizer):
    engine = start()
    whole = engine.submit(Request(PROMPT, max_tokens=40, sampling=GREEDY)).result(20)[0]
    assert len(whole.token_ids) == 40
    assert whole.finish_reason == "length"
    stop = whole.text[5:8]
    cut = engine.submit(Request(PROMPT, max_tokens=40, sampling=GREEDY, stop=[stop])).result(20)[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    token = whole.token_ids[6]
    place = whole.token_ids.index(token)
    ended = engine.submit(Request(PROMPT, max_tokens=40, sampling=GREEDY, stop_token_ids=[token])).result(20)[0]
    assert ended.token_ids == whole.token_ids[: place + 1]  # as generate gives it
    assert ended.finish_reason == "stop"
    text = byte_tokenizer.decode(whole.token_ids[:place])
    assert ended.text == text.rstrip("\ufffd")


def test_end_of_sequence_tokens_are_the_models(byte_tokenizer):
    model = model_of("llama")
    greedy = alone(model, PROMPT, 12)[0]
    model.generation_config.eos_token_id = [greedy[4], 2]
    with Engine(model, byte_tokenizer, AdapterStore(model), Limits(batch_tokens=32)) as engine:
        ended = engine.submit(Request(PROMPT, max_tokens=12, sampling=GREEDY)).result(20)[0]
        on = engine.submit(Request(PROMPT, max_tokens=12, sampling=GREEDY, ignore_eos=True)).result(20)[0]
    assert ended.finish_reason == "stop"
    assert list(ended.token_ids) == greedy[: greedy.index(greedy[4]) + 1]
    assert list(on.token_ids) == greedy


def test_several_answers_differ_and_a_seed_repeats_them_in_other_company(start):
    engine = start(names=["rows", "lora", "road1"])
    asked = Request(PROMPT, adapter="rows", n=3, max_tokens=12, sampling=Sampling(seed=5, temperature=1.2))

    def texts() -> list[tuple[int, ...]]:
        return [answer.token_ids for answer in engine.submit(asked).result(20)]

    first = texts()
    assert len(set(first)) == 3
    company = [
        engine.submit(Request(prompt_of(20, i), adapter=name, max_tokens=30))
        for i, name in enumerate(("lora", "road1", BASE))
    ]
    assert texts() == first
    for handle in company:
        handle.result(20)
    assert engine.submit(asked).result(20)[0].index == 0


def test_tasks_and_threads_share_an_engine(start):
    engine = start(names=["rows", "road1"])

    async def ask(name: str) -> list[int]:
        handle = engine.submit(Request(PROMPT, adapter=name, max_tokens=10, sampling=GREEDY))
        tokens: list[int] = []
        async for event in handle:
            tokens += event.token_ids
        assert event.usage is not None
        assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (6, 10)
        return tokens

    async def several() -> list[list[int]]:
        return await asyncio.gather(*(ask(name) for name in ("rows", "road1", BASE, "rows")))

    rows, road, base, again = asyncio.run(several())
    assert rows == again
    assert len({tuple(rows), tuple(road), tuple(base)}) == 3


def test_a_disconnected_task_frees_its_place(start):
    engine = start(max_running=1)

    async def leave() -> None:
        handle = engine.submit(Request(PROMPT, max_tokens=120))
        try:
            async for _ in handle:
                break
        finally:
            handle.cancel()

    asyncio.run(leave())
    eventually(lambda: engine.stats().running == 0)
    assert engine.stats().finished == {"cancelled": 1}


def test_figures_are_json_and_add_up(start):
    import json

    engine = start(names=["rows"], slots=2, max_running=2)
    engine.submit(Request(PROMPT, adapter="rows", n=2, max_tokens=3)).result(20)
    eventually(lambda: engine.stats().running == 0)
    stats = json.loads(json.dumps(engine.stats().to_dict()))
    assert stats["prompt_tokens"] == 12
    assert stats["generated_tokens"] == 6
    assert stats["slots"] == 2
    assert stats["adapters_put_in_slots"] == stats["store"]["registered"] == 1
    assert stats["adapter_bytes"] > 0
    assert stats["cache_tokens"] >= 256


def test_a_store_of_another_model_is_refused(byte_tokenizer, llama):
    with pytest.raises(UserError, match="the store was made for another model"):
        Engine(llama, byte_tokenizer, AdapterStore(model_of("llama")))
