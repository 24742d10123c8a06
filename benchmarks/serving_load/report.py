"""The figures of a load, as JSON, as a table and as a plot."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving_load.answers import Verdict
from benchmarks.serving_load.asking import Outcome

__all__ = ["markdown", "percentiles", "plot", "summary"]

_MEBIBYTE = 2**20
_FIGURES = {
    "loads": "turnrow_adapter_loads_total",
    "uploads": "turnrow_adapter_uploads_total",
    "evictions": "turnrow_adapter_evictions_total",
    "in_host_memory": "turnrow_adapters_in_memory",
    "host_bytes": "turnrow_adapter_host_bytes",
    "device_bytes": "turnrow_adapter_device_bytes",
    "steps": "turnrow_steps_total",
    "running": "turnrow_answers_running",
    "waiting": "turnrow_answers_waiting",
    "slots_in_use": "turnrow_adapter_slots_in_use",
    "cache_tokens_held": "turnrow_cache_tokens_held",
}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest; the value below which that share lies, between neighbours."""
    if not values:
        return {}
    if len(values) == 1:
        return dict.fromkeys(("p50", "p90", "p99", "most"), values[0])
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "most": max(values)}


def summary(
    outcomes: Sequence[Outcome],
    verdicts: Sequence[Verdict | None],
    memory: Sequence[tuple[float, int]],
    load: tuple[float, float],
    figures: Mapping[str, float],
    spoilt: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Sum up.

    Args:
        outcomes: of all requests.
        verdicts: on them; None where there was no whole answer to compare.
        memory: (s, resident bytes) of the server.
        load: when the first request was sent and the last ended, by the same clock.
        figures: of the server, after.
        spoilt: adapters whose files are damaged: requests for them must fail, and by themselves.
    """
    whole = [outcome for outcome in outcomes if outcome.status == 200 and not outcome.left]
    began, ended = load
    during = [resident for at, resident in memory if began <= at <= ended]
    before = [resident for at, resident in memory if at < began]
    half = [resident for at, resident in memory if began <= at <= (began + ended) / 2]
    expected_failure = [outcome for outcome in outcomes if outcome.ask.adapter in spoilt]
    lost = [
        outcome
        for outcome in outcomes
        if outcome.status != 200 and not (outcome.ask.adapter in spoilt and outcome.status == 500)
    ]
    tokens = sum(outcome.tokens for outcome in whole)
    seconds = ended - began
    return {
        "requests": len(outcomes),
        "distinct_adapters": len({outcome.ask.adapter for outcome in outcomes}),
        "statuses": {str(status): count for status, count in Counter(o.status for o in outcomes).items()},
        "whole_answers": len(whole),
        "left": sum(outcome.left for outcome in outcomes),
        "for_spoilt_adapters": len(expected_failure),
        "lost": len(lost),
        "errors": sorted({outcome.error for outcome in lost if outcome.error})[:5],
        "compared": sum(verdict is not None for verdict in verdicts),
        "ties": sum(verdict is not None and verdict.is_tie for verdict in verdicts),
        "wrong": sum(verdict is not None and not verdict.is_right and not verdict.is_tie for verdict in verdicts),
        "seconds": seconds,
        "requests_per_second": len(whole) / seconds,
        "tokens_per_second": tokens / seconds,
        "latency": {
            "first_token": percentiles([o.first - o.began for o in outcomes if o.first is not None]),
            "whole": percentiles([o.ended - o.began for o in whole]),
        },
        "server": {name: figures[metric] for name, metric in _FIGURES.items()},
        "memory_bytes": {
            "before": before[-1] if before else None,
            "half_way": half[-1] if half else None,
            "most": max(during, default=None),
            "after": memory[-1][1] if memory else None,
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    settings, found = result["settings"], result["summary"]
    memory, latency, server = found["memory_bytes"], found["latency"], found["server"]
    shown = lambda name: "–" if memory[name] is None else f"{memory[name] / _MEBIBYTE:,.0f}"  # noqa: E731
    times = lambda of: " / ".join(f"{latency[of].get(p, float('nan')):.2f}" for p in ("p50", "p90", "p99"))  # noqa: E731
    rows = [
        ("requests, answered, lost", f"{found['requests']}, {found['whole_answers']}, {found['lost']}"),
        (
            "answers compared with the merged models, wrong, parted at a tie",
            f"{found['compared']}, {found['wrong']}, {found['ties']}",
        ),
        ("different adapters asked for", f"{found['distinct_adapters']} of {settings['adapters']}"),
        ("to the first token, p50 / p90 / p99", f"{times('first_token')} s"),
        ("to the whole answer, p50 / p90 / p99", f"{times('whole')} s"),
        (
            "throughput",
            f"{found['requests_per_second']:.1f} requests, {found['tokens_per_second']:.0f} new tokens a second",
        ),
        (
            "adapters read from disk, put into slots, evicted from slots",
            f"{server['loads']:.0f}, {server['uploads']:.0f}, {server['evictions']:.0f}",
        ),
        (
            "resident memory before, half-way, at most, after",
            f"{shown('before')}, {shown('half_way')}, {shown('most')}, {shown('after')} MiB",
        ),
    ]
    if found["left"] or found["for_spoilt_adapters"]:
        rows.append(
            ("clients that left, requests for spoilt adapters", f"{found['left']}, {found['for_spoilt_adapters']}")
        )
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw how long answers took, and the server's memory over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(1, 2)
    for name, values in result["latencies"].items():
        ordered = sorted(values)
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        times.step(
            ordered, shares, where="post", label={"first_token": "first token (streams)", "whole": "whole"}[name]
        )
    times.set(xlabel="s", ylabel="share of answers", ylim=(0, 1.01), title="Latency")
    times.set_xlim(left=0)
    times.legend(loc="lower right", frameon=False)
    began, ended = result["load"]
    memory.plot([at for at, _ in result["memory"]], [resident / _MEBIBYTE for _, resident in result["memory"]])
    memory.axvspan(began, ended, alpha=0.12, label="requests")
    memory.set(xlabel="s since the server's start", ylabel="MiB", title="Resident memory of the server")
    memory.set_ylim(bottom=0)
    memory.legend(loc="lower right", frameon=False)
    for axes in (times, memory):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
