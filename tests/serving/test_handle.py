"""The client's end of a request."""

from __future__ import annotations

import asyncio
import threading

import pytest

from turnrow.serving import Event, Handle, RequestFailed, TokenLogprob


def handle_of(answers: int = 1) -> tuple[Handle, list[str]]:
    cancelled: list[str] = []
    return Handle("r1", 3, answers, lambda: cancelled.append("r1")), cancelled


def feed(handle: Handle) -> None:
    handle.put(Event(0, "a", (1,)))
    handle.put(Event(1, "x", (7,), finish_reason="length"))
    handle.put(Event(0, "b", (2,), finish_reason="stop"))


def test_a_thread_reads_every_event_and_then_the_end():
    handle, _ = handle_of(2)
    threading.Timer(0.01, feed, [handle]).start()
    assert [(event.index, event.text) for event in handle] == [(0, "a"), (1, "x"), (0, "b")]
    assert handle.done


def test_a_task_reads_every_event_without_blocking_its_loop():
    async def read() -> tuple[list[str], int]:
        handle, _ = handle_of(2)
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while not handle.done:
                beats += 1
                await asyncio.sleep(0.001)

        threading.Timer(0.03, feed, [handle]).start()
        other = asyncio.create_task(beat())
        texts = [event.text async for event in handle]
        await other
        return texts, beats

    texts, beats = asyncio.run(read())
    assert texts == ["a", "x", "b"]
    assert beats > 3


def test_a_loop_that_is_left_loses_no_event():
    handle, _ = handle_of(2)
    feed(handle)
    assert next(iter(handle)).text == "a"
    assert [event.text for event in handle] == ["x", "b"]


def test_a_task_that_leaves_its_loop_loses_no_event():
    async def read() -> list[str]:
        handle, _ = handle_of(2)
        feed(handle)
        async for event in handle:
            assert event.text == "a"
            break
        return [event.text async for event in handle]

    assert asyncio.run(read()) == ["x", "b"]


def test_answers_are_put_together_from_their_events():
    handle, _ = handle_of(2)
    handle.put(Event(0, "a", (1,), (TokenLogprob(1, -0.5),)))
    handle.put(Event(1, "x", (7,), (TokenLogprob(7, -2.0),), finish_reason="length"))
    handle.put(Event(0, "b", (2,), (TokenLogprob(2, -1.0),), finish_reason="stop"))
    first, second = asyncio.run(handle.result_async())
    assert (first.text, first.token_ids, first.finish_reason) == ("ab", (1, 2), "stop")
    assert first.logprobs == (TokenLogprob(1, -0.5), TokenLogprob(2, -1.0))
    assert (second.index, second.text, second.finish_reason) == (1, "x", "length")


def test_a_failure_comes_after_the_events_before_it():
    handle, _ = handle_of()
    handle.put(Event(0, "a", (1,)))
    handle.fail(RequestFailed("timeout", "too late"))
    handle.fail(RequestFailed("engine", "and then this"))
    events = iter(handle)
    assert next(events).text == "a"
    with pytest.raises(RequestFailed, match="too late") as failure:
        next(events)
    assert failure.value.kind == "timeout"
    assert handle.error is failure.value


def test_what_has_ended_well_does_not_fail_afterwards():
    handle, _ = handle_of()
    handle.put(Event(0, "a", (1,), finish_reason="stop"))
    handle.fail(RequestFailed("cancelled", "too late"))
    assert [answer.text for answer in handle.result()] == ["a"]
    assert handle.error is None


def test_waiting_too_long_for_a_result_cancels():
    handle, cancelled = handle_of()
    with pytest.raises(TimeoutError, match="request r1 took longer than 0.01 s"):
        handle.result(0.01)
    assert cancelled == ["r1"]


def test_a_reader_whose_loop_has_gone_disturbs_nobody():
    handle, _ = handle_of()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(aiter(handle)), 0.01)

    asyncio.run(give_up())
    handle.put(Event(0, "a", (1,), finish_reason="stop"))
    assert [event.text for event in handle] == ["a"]
