"""The benchmark of the forecast: its table, from figures put in by hand. What it measures is run by tests/training/test_plan.py."""

from __future__ import annotations

from typing import Any

from benchmarks.plan import markdown

MEBIBYTE = 2**20


def result(resident_growth: int) -> dict[str, Any]:
    forecast = {
        "base_bytes": 70 * MEBIBYTE,
        "adapter_bytes": 10 * MEBIBYTE,
        "batches": [{"batch": 4, "saved_bytes": 90 * MEBIBYTE, "peak_bytes": 180 * MEBIBYTE}],
    }
    figures = {"loaded": 80, "growth": resident_growth, "total": 80 + resident_growth}
    in_bytes = {name: value * MEBIBYTE for name, value in figures.items()}
    ratio = {
        "live": 1.0,
        "resident growth": 100 / resident_growth,
        "resident total": 180 / (80 + resident_growth),
        "growth as it comes": 0.5,
    }
    entry = {
        "forecast": forecast,
        "resident": {**in_bytes, "live": 100 * MEBIBYTE},
        "as_it_comes": {**in_bytes, "growth": 200 * MEBIBYTE},
        "ratio": ratio,
    }
    return {
        "machine": {"processor": "some processor", "system": "Linux"},
        "versions": {"torch": "2.13"},
        "commit": {"commit": "0123456789abcdef", "modified": False},
        "settings": {"threads": 2, "libc": "glibc 2.36"},
        "cases": {"llama": {"methods": {"rocoft row r=3": entry}}},
    }


def test_the_table_shows_the_growth_beside_the_forecast() -> None:
    shown = markdown(result(104))
    assert "| llama | rocoft row r=3 | 80.0 | 100.0 | 100.0 (1.000) | 104.0 (0.962) | 200.0 (0.500) | 0.978 |" in shown
    assert "some processor, 2 threads, Linux, glibc 2.36" in shown


def test_a_goal_that_is_missed_is_said() -> None:
    assert "- resident growth: forecast / measured 0.962 to 0.962; within 15%: reached" in markdown(result(104))
    assert "- resident growth: forecast / measured 0.833 to 0.833; within 15%: MISSED" in markdown(result(120))
    assert "- growth as it comes: forecast / measured 0.500 to 0.500; within 15%: MISSED" in markdown(result(104))
