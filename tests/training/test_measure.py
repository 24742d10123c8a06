from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from turnrow.training import measure
from turnrow.training.measure import StepClock, peak_memory, reset_peak_memory
from turnrow.training.seeding import deterministic

CPU = torch.device("cpu")


def test_the_clock_gives_the_mean_since_it_was_last_read(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 10.0, 13.0, 20.0, 25.0])
    monkeypatch.setattr(measure, "perf_counter", lambda: next(times))
    clock = StepClock()
    events = (TrainingArguments(report_to="none", use_cpu=True), TrainerState(), TrainerControl())
    assert clock.drain() is None
    for steps, mean in ((2, 2.0), (1, 5.0)):
        for _ in range(steps):
            clock.on_step_begin(*events)
            clock.on_step_end(*events)
        assert clock.drain() == mean


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak")
def test_the_peak_is_that_since_the_reset() -> None:
    block = bytearray(b"x") * (100 * 2**20)
    high, kind = peak_memory(CPU)
    del block
    reset_peak_memory(CPU)
    low, _ = peak_memory(CPU)
    assert kind == "peak resident set of the process"
    assert high - low > 50 * 2**20


def test_determinism_ends_with_the_block() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic(3):
        assert torch.are_deterministic_algorithms_enabled()
        first = torch.rand(2)
    with deterministic(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.are_deterministic_algorithms_enabled() == before


def test_reading_a_recipe_does_not_wait_for_the_heavy_libraries() -> None:
    code = (
        "import sys, turnrow.training, turnrow.cli.main as m; m._parser(); "
        "print(*[n for n in ('datasets', 'matplotlib', 'jinja2.environment', 'pandas', 'sklearn') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "datasets" not in found.stdout
    assert "matplotlib" not in found.stdout
