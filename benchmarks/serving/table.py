"""The table of a result file, and which of the goals it reaches."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.serving.methods import BASE, METHODS
from benchmarks.table import origin

__all__ = ["GOALS", "PEER_GOAL", "markdown", "tokens_per_second"]

GOALS: dict[str, float] = {"road_1": 0.95, "rows": 0.92, "columns": 0.92}
"""The least share of the base model's speed, at the largest number of adapters, under every load."""

PEER_GOAL = 4.0
"""How many times as fast as peft's batch of as many adapters, in decoding."""

_DECODING = "decode"
_RIVALS = ("lora", "peft_lora", "peft_road")


def tokens_per_second(settings: dict[str, Any], load: str, seconds: float) -> float:
    """New tokens in decoding; where prompts are most of the work, tokens read and new."""
    prompt, new = settings["loads"][load]
    return settings["requests"] * (new if load == _DECODING else prompt + new) / seconds


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result, one for each load, with its setting above and its goals below."""
    settings = result["settings"]
    setting = origin(
        {**result, "settings": {**settings, "repeats": settings["rounds"]}},
        f"{settings['requests']} requests in a batch; speed as a share of the base model's in the same engine, by {_clock(settings)}",
    )
    parts = [setting]
    for load in settings["loads"]:
        parts += [_title(settings, load), _rows(result, load)]
    return "\n\n".join([*parts, _goals(result)]) + "\n"


def _clock(settings: dict[str, Any]) -> str:
    return {"thread_time": "processor time", "perf_counter": "the time of day"}[settings["clock"]]


def _title(settings: dict[str, Any], load: str) -> str:
    prompt, new = settings["loads"][load]
    counted = "new tokens" if load == _DECODING else "tokens read and new"
    return f"Prompts of {prompt} tokens and {new} new ones; {counted} a second:"


def _rows(result: dict[str, Any], load: str) -> str:
    settings = result["settings"]
    counts = [str(count) for count in settings["adapters"]]
    heads = [f"{count} adapter{'s' if count != '1' else ''}" for count in counts]
    lines = [f"| | {' | '.join(heads)} | parameters an adapter |", f"|---|{'--:|' * (len(counts) + 1)}"]
    for name, method in result["methods"].items():
        found = method[load]["adapters"]
        cells = [_cell(found[count], settings, load) if count in found else "" for count in counts]
        if "0" in found:
            cells[-1] = _cell(found["0"], settings, load)
        lines.append(f"| {METHODS[name].title} | {' | '.join(cells)} | {method['parameters']:,} |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any], settings: dict[str, Any], load: str) -> str:
    ratio = entry["ratio"]
    low, high = ratio["quartiles"]
    speed = tokens_per_second(settings, load, entry["seconds"]["median"])
    return f"{ratio['median']:.3f} ({low:.3f}–{high:.3f}), {speed:,.0f}"


def _goals(result: dict[str, Any]) -> str:
    settings, methods = result["settings"], result["methods"]
    most = str(max(settings["adapters"]))

    def at_most(name: str, load: str) -> dict[str, Any]:
        return methods[name][load]["adapters"][most]

    rivals = [name for name in _RIVALS if name in methods]
    heads = [f"with {most} adapters", f"of {BASE} (goal)", *(f"times {name}" for name in rivals)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for load in settings["loads"]:
        for name, least in GOALS.items():
            if name not in methods:
                continue
            cells = [_reached(at_most(name, load)["ratio"]["median"], least, "{:.3f}")]
            for rival in rivals:
                times = _times(at_most(rival, load), at_most(name, load))
                goal = 1.0 if rival == "lora" else PEER_GOAL if load == _DECODING else None
                cells.append(f"{times:.2f}" if goal is None else _reached(times, goal, "{:.2f}"))
            lines.append(f"| {name}, {load} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _reached(value: float, goal: float, form: str) -> str:
    return f"{form.format(value)} ({goal:g}: {'reached' if value >= goal else 'MISSED'})"


def _times(slower: dict[str, Any], faster: dict[str, Any]) -> float:
    """How many times as fast, the median over the rounds that both ran in."""
    pairs = zip(slower["seconds"]["samples"], faster["seconds"]["samples"], strict=False)
    return statistics.median(slow / fast for slow, fast in pairs)
