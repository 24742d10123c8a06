"""Probe against fine-tuning: the methods that can be compared, and correlations that a person can check."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import probe
from benchmarks.suite.store import Store
from benchmarks.suite.suite import load_suite
from turnrow.training.methods import check_method
from turnrow.training.probing import MethodProbe, Probe


def result(**methods: tuple[float, float, int, float]) -> dict[str, Any]:
    """By name: the probe's score, distance, parameters, and what fine-tuning reached in percent."""
    return {
        "task": "sst2",
        "methods": {
            name: {
                "scores": [score, score],
                "distances": {"p = 2": [distance, distance]},
                "parameters": parameters,
                "fine_tuned": [real, real],
            }
            for name, (score, distance, parameters, real) in methods.items()
        },
    }


RESULT = result(a=(0.9, 0.3, 30, 80.0), b=(0.8, 0.2, 10, 79.0), c=(0.7, 0.1, 20, 70.0))


def test_correlations_are_of_ranks() -> None:
    found = probe.correlations(RESULT)
    assert found["score"][0] == pytest.approx(1)
    assert found["nearness"][0] == pytest.approx(-1)
    assert found["parameters"][0] == pytest.approx(0.5)


def test_tables_say_what_following_the_probe_costs(tmp_path: Path) -> None:
    (tmp_path / "sst2.json").write_text(json.dumps(RESULT))
    (tmp_path / "trec.json").write_text(
        json.dumps({**result(a=(0.9, 0.3, 30, 70.0), b=(0.8, 0.2, 10, 80.0)), "task": "trec"})
    )
    shown = probe.markdown(tmp_path)
    assert "| sst2 | 3 | +1.00 (p = 0.00) | -1.00 (p = 0.00) | +0.50 (p = 0.67) | 0.0 (at random 3.7) |" in shown
    assert "10.0 (at random 5.0)" in shown
    assert "| a | 90.0 ± 0.0 | 0.30 | 30 | 80.0 ± 0.0 |" in shown


def test_methods_with_every_seed_and_a_known_kernel_are_compared(tmp_path: Path) -> None:
    suite = load_suite("minilm")
    for name in ("rows r=1", "VeRA r=256", "LoRA r=8", "DoRA r=8"):
        cell = next(suite.cells(("sst2",), None, (name,)))
        for seed in cell.seeds[: 2 if name == "LoRA r=8" else 3]:
            run = {"learning_rate": 1e-3, "seed": seed, "main_metric": "accuracy", "greater_is_better": True}
            Store(cell, tmp_path).add(
                {**run, "trainable_parameters": 1, "validation": {"accuracy": 0.7}, "test": {"accuracy": 0.8}}
            )
    assert [(name, scores) for name, _, scores in probe.measured("sst2", tmp_path)] == [
        ("rows r=1", (80.0, 80.0, 80.0))
    ]


def test_too_few_methods_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "measured", lambda task: [])
    (tmp_path / "mr").mkdir()
    (tmp_path / "mr" / "train.jsonl.gz").touch()
    assert probe.main(["--data", str(tmp_path), "--tasks", "mr", "--folder", str(tmp_path)]) == 0
    assert "mr: 0 methods were fine-tuned with every seed; 6 are needed" in capsys.readouterr().out


def test_methods_that_differ_in_one_option_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite("ablations")
    names = ("rows r=3, gradient", "rows r=3, gradient, biases")
    methods = [(name, next(suite.cells(("sst2",), None, (name,))), (80.0,)) for name in names]
    probed = [
        MethodProbe(
            title="", method=check_method(cell.fields["method"]), trainable_parameters=number, scores=(0.1 * number,)
        )
        for number, (_, cell, _) in enumerate(methods, start=1)
    ][::-1]
    facts = {
        "model": "m",
        "task": "sst2",
        "metric": "accuracy",
        "outputs": "",
        "shots": 2,
        "held_rows": 1,
        "held_from": "",
    }
    costs = {
        "seeds": (0,),
        "start_scores": (0.5,),
        "batch": 1,
        "sequence": 1,
        "device": "cpu",
        "threads": 1,
        "seconds": 1.0,
    }
    monkeypatch.setattr(probe, "probe", lambda *_, **__: Probe(**facts, **costs, methods=tuple(probed)))
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "sst2" / f"{split}.jsonl.gz").write_bytes(gzip.compress(b'{"sentence": "a", "label": 1}\n'))
    kept = probe.run("sst2", tmp_path, shots=2, draws=1, rows=1, methods=methods)["methods"]
    assert {name: one["parameters"] for name, one in kept.items()} == dict(zip(names, (1, 2), strict=True))
