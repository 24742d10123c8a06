"""The markdown table of a result file, and which of the goals it reaches."""

from __future__ import annotations

from typing import Any

__all__ = ["GOALS", "markdown", "origin"]

_MEBIBYTE = 2**20


# (method, figure, largest allowed ratio to the limit or name of the method it must not exceed)
GOALS: tuple[tuple[str, str, float | str], ...] = (
    ("rows", "time", 1.04),
    ("columns", "time", 1.04),
    ("columns", "saved", 1.01),
    ("rows", "saved", "lora"),
    ("road_1", "time", 1.10),
    ("road_1", "saved", 1.30),
)
"""What the project set itself for the ``llama`` and ``bert`` shapes in float32 on a CPU."""


def markdown(result: dict[str, Any]) -> str:
    """Return the table of `result` (as `benchmarks.step_cost` wrote it), with its setting above and its goals below."""
    return "\n\n".join([_setting(result), _rows(result["methods"]), _goals(result["methods"])]) + "\n"


def _setting(result: dict[str, Any]) -> str:
    settings = result["settings"]
    tokens = settings["batch"] * settings["sequence"]
    return origin(result, f"{settings['batch']} x {settings['sequence']} = {tokens} tokens a step")


def origin(result: dict[str, Any], work: str) -> str:
    """Return the line above a table: model, work, machine, rounds, versions and commit."""
    machine, shape, settings = result["machine"], result["shape"], result["settings"]
    where = machine.get("accelerator") or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"{settings['shape']}: {shape['family']}, hidden {shape['hidden']}, intermediate {shape['intermediate']}, "
        f"{shape['layers']} layers, vocabulary {shape['vocabulary']}; {work}, {settings['dtype']}, {where}; "
        f"median of {settings['repeats']} interleaved rounds (quartiles); {packages}; "
        f"commit {result['commit']['commit'][:12]}{' with changes' if result['commit']['modified'] else ''}."
    )


def _rows(methods: dict[str, Any]) -> str:
    lines = [
        "| method | time / limit | ms a step | saved for backward, MiB | saved / limit | peak of a step, MiB | trained parameters | AdamW state, KiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods.values():
        if "failed" in method:
            lines.append(f"| {method['title']} | {method['failed']} | | | | | | |")
            continue
        ratio = method["ratio"]
        lines.append(
            f"| {method['title']} | {ratio['median']:.3f} ({ratio['quartiles'][0]:.3f}–{ratio['quartiles'][1]:.3f}) "
            f"| {1000 * method['seconds']['median']:.1f} | {method['saved_bytes'] / _MEBIBYTE:.1f} "
            f"| {method['saved_ratio']:.3f} | {method['peak_bytes'] / _MEBIBYTE:.1f} "
            f"| {method['trained_parameters']:,} | {method['adamw_state_bytes'] / 1024:,.0f} |"
        )
    return "\n".join(lines)


def _goals(methods: dict[str, Any]) -> str:
    keys = {"time": lambda method: method["ratio"]["median"], "saved": lambda method: method["saved_ratio"]}
    lines = []
    for name, figure, goal in GOALS:
        others = {name, goal} if isinstance(goal, str) else {name}
        if any(other not in methods or "failed" in methods[other] for other in others):
            continue
        reached = keys[figure](methods[name])
        bound = keys[figure](methods[goal]) if isinstance(goal, str) else goal
        said = f"{goal}'s {bound:.3f}" if isinstance(goal, str) else f"{bound:.2f}"
        lines.append(
            f"- {name}, {figure} / limit at most {said}: {reached:.3f}, {'reached' if reached <= bound else 'MISSED'}"
        )
    return "\n".join(lines)
