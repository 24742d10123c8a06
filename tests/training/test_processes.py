from __future__ import annotations

import pytest
import torch

from turnrow.training import processes
from turnrow.training.processes import any_process, from_first, is_first, let_others_speak, wait_for_all


def test_one_process_asks_nobody() -> None:
    wait_for_all()
    assert is_first()
    assert from_first({"a": 1}) == {"a": 1}
    assert any_process(True, torch.device("cpu"))
    assert not any_process(False, torch.device("cpu"))


def test_the_first_process_reports_at_once_and_others_hold_back(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", waits.append)
    let_others_speak(ValueError("bad input"))
    assert not waits
    monkeypatch.setenv("RANK", "1")
    assert not is_first()
    let_others_speak(ValueError("bad input"))
    assert waits == [processes.GRACE]


def test_an_error_about_a_lost_process_is_left_to_that_process(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", waits.append)
    monkeypatch.setattr(processes, "are_several", lambda: True)
    monkeypatch.setattr(processes, "is_first", lambda: True)
    let_others_speak(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert waits == [processes.GRACE]
    let_others_speak(RuntimeError("out of memory"))
    assert waits == [processes.GRACE]
