"""While other threads run the model: every call computes wholly with the old adapter or wholly with the new one."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tuners.models import identical, output, snapshot
from tests.tuners.swapping import inputs_for, load, network, save_pair
from turnrow import SwapGate, hotswap_adapter, swap_gate
from turnrow.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SOME = pytest.mark.parametrize("method", ["row", "row+column", "road_1"])


@pytest.fixture
def x():
    return torch.randn(2, 5, 16)


@pytest.fixture
def threads():
    """`threads(function, ...)` starts one for each; all are through before the test is, and their errors are its own."""
    started, errors = [], []

    def start(*functions):
        def run(function):
            try:
                function()
            except BaseException as error:
                errors.append(error)

        new = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
        started.extend(new)
        for thread in new:
            thread.start()
        return new

    yield start
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors, errors


@pytest.fixture
def many_switches():
    """Threads take turns every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _until(condition):
    """Let other threads run until they have come there."""
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("never came true")


def _waits(gate):
    return bool(gate._waiting)


# --- a forward that is in the middle when a swap comes ------------------------------------------------------------------


@SOME
def test_a_swap_waits_for_a_forward_that_is_in_the_middle(method, tmp_path, x, threads):
    old, new = save_pair(tmp_path, method, None)
    model = network(old)
    expected = model(x), network(new)(x)
    gate, swapped = swap_gate(model), threading.Event()

    def swap():
        hotswap_adapter(model, new)
        swapped.set()

    def in_the_middle(*_):
        threads(swap)
        _until(lambda: _waits(gate) or swapped.is_set())

    hook = model.get_submodule("base_model.model.v_proj").register_forward_hook(in_the_middle)
    assert torch.equal(model(x), expected[0])
    hook.remove()
    swapped.wait(60)
    assert torch.equal(model(x), expected[1])


def test_a_generation_is_of_one_adapter_from_beginning_to_end(tmp_path, threads):
    old, new = save_pair(tmp_path, "row")
    model, settings = load(old), {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    inputs = {"input_ids": inputs_for()["input_ids"], "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    expected = model.generate(**inputs, **settings), load(new).generate(**inputs, **settings)
    assert not torch.equal(*expected)
    gate, swapped, steps = swap_gate(model), threading.Event(), []

    def swap():
        hotswap_adapter(model, new)
        swapped.set()

    def after_each_step(*_):
        steps.append(swapped.is_set())
        if len(steps) == 2:
            threads(swap)
            _until(lambda: _waits(gate) or swapped.is_set())

    hook = model.get_base_model().register_forward_hook(after_each_step)
    assert torch.equal(model.generate(**inputs, **settings), expected[0])
    hook.remove()
    assert steps == [False] * 6
    swapped.wait(60)
    assert torch.equal(model.generate(**inputs, **settings), expected[1])


# --- many forwards, many swaps ----------------------------------------------------------------------------------------


def _torn(call, expected, model, folders, threads, swaps=30):
    """Outputs of two threads that are neither of the expected ones while the adapters are swapped; how often each was seen."""
    done, torn, seen = threading.Event(), [], [0, 0]

    def forwards():
        while not done.is_set():
            y = call()
            which = [torch.equal(y, one) for one in expected]
            if any(which):
                seen[which.index(True)] += 1
            else:
                torn.append(y)

    running = threads(forwards, forwards)
    try:
        for swap in range(swaps):
            before = sum(seen)
            hotswap_adapter(model, folders[(swap + 1) % 2])
            _until(lambda before=before: sum(seen) > before + 1 or torn)
    finally:
        done.set()
    for thread in running:
        thread.join(60)
    return torn, seen


@SOME
@pytest.mark.usefixtures("many_switches")
def test_every_forward_is_of_one_of_the_two_adapters(method, tmp_path, threads):
    folders = save_pair(tmp_path, method)
    model, inputs = load(folders[0]), inputs_for()
    base = snapshot(model)
    expected = [output(load(folder), inputs) for folder in folders]
    swap_gate(model)
    torn, seen = _torn(lambda: output(model, inputs), expected, model, folders, threads)
    assert not torn
    assert all(seen)
    with model.disable_adapter():
        assert identical(snapshot(model), base)


@pytest.mark.parametrize("method", ["row+column", "road_1"])
@pytest.mark.usefixtures("many_switches")
def test_so_is_every_compiled_forward_without_compiling_again(method, tmp_path, threads, x):
    torch._dynamo.reset()
    folders = save_pair(tmp_path, method, None)
    # Not fullgraph=True, whose check counts frames for all threads at once up to torch 2.13 (pytorch/pytorch#185138): where one
    # call begins while another ends, it stops with "no compiled frames". A break of the graph would be a second frame below.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network(folders[0]), backend=counter)
    swap_gate(compiled)
    with torch.no_grad():
        expected = [compiled(x)]
        hotswap_adapter(compiled, folders[1])
        expected.append(compiled(x))
        hotswap_adapter(compiled, folders[0])

    def call():
        with torch.no_grad():
            return compiled(x)

    torn, seen = _torn(call, expected, compiled, folders, threads)
    assert not torn
    assert all(seen)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@SOME
@pytest.mark.usefixtures("many_switches")
def test_several_threads_may_be_the_first_to_run_a_model(method, tmp_path, threads, x):
    folder, _ = save_pair(tmp_path, method, None)
    expected = network(folder)(x)
    for _ in range(10):
        model, outputs, ready = network(folder), [], threading.Barrier(3)
        base = snapshot(model)

        def run(model=model, outputs=outputs, ready=ready):
            ready.wait(60)
            outputs.append(model(x))

        for thread in threads(run, run, run):
            thread.join(60)
        assert all(torch.equal(y, expected) for y in outputs)
        with model.disable_adapter():
            assert identical(snapshot(model), base)


# --- the gate by itself -----------------------------------------------------------------------------------------------


def test_who_waits_to_change_the_model_goes_before_who_comes_later(threads):
    gate, order, first, begun = SwapGate(), [], threading.Event(), threading.Event()

    def running():
        with gate.running():
            begun.set()
            first.wait(60)
            with gate.running():  # the same thread again, although somebody waits
                order.append("first")

    def changing():
        with gate.alone(), gate.alone(), gate.running():
            order.append("change")

    def later():
        with gate.running():
            order.append("later")

    threads(running)
    begun.wait(60)
    threads(changing)
    _until(lambda: _waits(gate))
    threads(later)
    first.set()
    _until(lambda: len(order) == 3)
    assert order == ["first", "change", "later"]


def test_any_number_of_threads_run_at_once(threads):
    gate, inside = SwapGate(), threading.Barrier(3)

    def running():
        with gate.running():
            inside.wait(60)

    threads(running, running, running)


def _free(gate, threads):
    """Whether another thread gets to be alone."""
    alone = threading.Event()

    def change():
        with gate.alone():
            alone.set()

    threads(change)
    return alone.wait(60)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_a_forward_that_fails_leaves_the_gate(error, compiled, tmp_path, x, threads):
    def fail(*_):
        raise error

    model = network(save_pair(tmp_path, "row", None)[0])
    way = torch.compile(model, backend="eager") if compiled else model
    if compiled:
        way.forward = fail
    else:
        model.get_submodule("base_model.model.v_proj").register_forward_pre_hook(fail)
    gate = swap_gate(way)
    with pytest.raises(error):
        way(x)
    assert _free(gate, threads)


def test_who_gives_up_waiting_leaves_the_gate(threads):
    gate, go, begun = SwapGate(), threading.Event(), threading.Event()

    def running():
        with gate.running():
            begun.set()
            go.wait(60)

    threads(running)
    begun.wait(60)
    gate._changed.wait_for, waited = _interrupted, gate._changed.wait_for
    with pytest.raises(KeyboardInterrupt), gate.alone():
        raise AssertionError
    gate._changed.wait_for = waited
    with gate.running():
        go.set()
    assert _free(gate, threads)


def _interrupted(_):
    raise KeyboardInterrupt


def test_a_thread_that_runs_the_model_cannot_change_it(tmp_path, x):
    old, new = save_pair(tmp_path, "row", None)
    model = network(old)
    gate, before = swap_gate(model), model(x)
    with gate.running():
        with pytest.raises(UserError, match="by a thread that is running it, which would wait for itself"):
            hotswap_adapter(model, new)
        assert torch.equal(model(x), before)
    hotswap_adapter(model, new)


def test_other_changes_can_be_made_alone_too(tmp_path, x):
    old, new = save_pair(tmp_path, "row", None)
    model = network(old)
    with swap_gate(model).alone():
        model.load_adapter(str(new), adapter_name="other")
        model.set_adapter("other")
        hotswap_adapter(model, new)
        assert torch.equal(model(x), network(new)(x))


# --- which ways into a model it guards ---------------------------------------------------------------------------------


def test_a_model_has_one_gate_and_a_copy_its_own(tmp_path, x):
    old, new = save_pair(tmp_path, "row", None)
    model = network(old)
    gate = swap_gate(model)
    assert swap_gate(model) is gate
    assert swap_gate(torch.compile(model, backend="eager")) is gate
    before = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert swap_gate(other) is not gate
        hotswap_adapter(other, new)
        assert torch.equal(other(x), network(new)(x))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("in_place", [True, False])
def test_what_was_compiled_after_the_gate_was_put_up_is_not_swapped(in_place, tmp_path):
    old, new = save_pair(tmp_path, "row", None)
    model = network(old)
    gate = swap_gate(model)
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    with pytest.raises(UserError, match=r"compiled after its gate was put up.*call turnrow.swap_gate\(\)"):
        hotswap_adapter(compiled, new)
    assert swap_gate(compiled) is gate
    hotswap_adapter(compiled, new)


def test_a_compiled_module_inside_is_guarded_on_request(tmp_path, x, threads):
    old, new = save_pair(tmp_path, "row", None)
    model = network(old)
    gate = swap_gate(model)
    compiled = gate.guard(torch.compile(model.get_base_model(), backend="eager"))
    with gate.running():
        expected = compiled(x)
        threads(lambda: hotswap_adapter(model, new))
        _until(lambda: _waits(gate))
        assert torch.equal(compiled(x), expected)  # the same thread may
    _until(lambda: not _waits(gate))
    assert torch.allclose(compiled(x), network(new)(x), atol=1e-5)
    with pytest.raises(
        UserError, match="this Linear is not compiled: a call of the PeftModel itself is under the gate"
    ):
        gate.guard(nn.Linear(1, 1))
