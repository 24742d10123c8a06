"""How the bytes and seconds of one training step are measured. Nothing in here knows a method or a model."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from turnrow.training.live_bytes import LiveBytes

__all__ = ["LiveBytes", "adamw_state_bytes", "held_bytes", "interleaved_seconds", "peak_bytes", "saved_bytes"]


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that autograd saves for backward in `forward`, weights excluded.

    Every storage that a saved tensor lies in counts once and whole, for a saved view keeps all of its storage alive.
    Storages of the model's parameters and buffers do not count: they exist without the step. What a custom autograd
    function hides from the hooks (a tensor kept as a plain attribute) is not seen here, but is in `held_bytes`.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result keeps the graph, and with it every counted storage, alive: no address is given out twice.
        result = forward()
    del result
    return sum(storages.values())


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes that `step` had allocated at any moment on top of what was allocated before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        step()
    return live.peak


def held_bytes(forward: Callable[[], Tensor], device: str = "cpu") -> int:
    """Return the bytes allocated in `forward` that are still held when it ends: the graph's, hidden from hooks or not."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = forward()
        held = torch.cuda.memory_allocated(device) - before
        del result
        return held
    with LiveBytes() as live:
        result = forward()
        gc.collect()
        held = live.now
    del result
    return held


def adamw_state_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of AdamW's state for `parameters` after a step, taken on the meta device: nothing is allocated."""
    copies = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    if not copies:
        return 0
    for copy in copies:
        copy.grad = torch.empty_like(copy)
    optimizer = torch.optim.AdamW(copies, foreach=False)
    optimizer.step()
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def interleaved_seconds(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, device: str, seed: int
) -> dict[str, list[float]]:
    """Time every step once per round, in an order shuffled anew for each round.

    Interleaving makes the steps share whatever else the machine does, so that ratios within a round are fair where
    absolute seconds are not. Python's garbage collector runs between the steps, never inside one.

    Returns:
        For each name the seconds of its step in round 0, 1, ...
    """
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            gc.collect()
            gc.disable()
            try:
                wait()
                start = time.perf_counter()
                steps[name]()
                wait()
                seconds[name].append(time.perf_counter() - start)
            finally:
                gc.enable()
    return seconds
