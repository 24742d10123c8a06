"""What a training step of each method costs: all methods of a suite in one run on one machine, interleaved.

    python -m benchmarks.suite cost minilm

The step times in the files of runs come from machines that did other work; these are the ones to compare. The limit is the frozen model: a forward, and a
backward to the embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, measure
from benchmarks.results import spread, write
from benchmarks.suite.suite import Suite

__all__ = ["COSTS", "Cost", "CostRun", "measure_costs", "method_costs", "read_costs"]

COSTS = Path(__file__).parents[1] / "results" / "costs"
_FORMAT = 1
_LIMIT = "frozen"

Cost = Mapping[str, Any]
"""``title``, ``seconds`` and ``ratio`` (spreads; the ratio is to the frozen model's forward and backward to the embeddings) and ``peak_bytes``."""


@dataclass(frozen=True)
class CostRun:
    """What one run of `measure_costs` found."""

    settings: Mapping[str, Any]
    """``device``, ``dtype``, ``batch``, ``sequence`` and ``rounds``."""
    machine: Mapping[str, Any]
    """As in `environment.machine`."""
    methods: Mapping[str, Cost]
    """By slug of a method, and ``frozen``."""


def measure_costs(
    suite: Suite,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch: int | None = None,
    sequence: int | None = None,
    rounds: int = 9,
    root: Path = COSTS,
) -> Path:
    """Time forward, backward and optimizer step of every method, and write ``results/costs/SUITE-DEVICE.json``.

    Args:
        suite: whose methods and base.
        device: where to.
        dtype: of the base's weights.
        batch: rows; the default is what the suite trains with.
        sequence: tokens a row, all of them real ones; the default is the suite's too.
        rounds: how often every method is timed, in an order shuffled for each round.
        root: the folder.
    """
    steps = dict[str, _Step]()
    titles = {}
    batch, sequence = batch or suite.step[0], sequence or suite.step[1]
    for _, name, fields in suite.methods():
        cell = suite.cell(suite.tasks[0], fields)
        titles[cell.slug] = name
        steps[cell.slug] = _Step(_build(cell.recipe, dtype), batch, sequence, device)
    whole = suite.cell(suite.tasks[0], {"method": {"name": "full"}})
    steps[_LIMIT] = _Step(_build(whole.recipe, dtype), batch, sequence, device)
    steps[_LIMIT].freeze()
    for step in steps.values():
        step()
    calls: dict[str, Callable[[], object]] = dict(steps)
    seconds = measure.interleaved_seconds(calls, rounds=rounds, device=device, seed=0)
    limits = seconds[_LIMIT]
    found = {
        name: {
            "title": titles.get(name, "the limit: frozen model"),
            "seconds": spread(times),
            "ratio": spread([time / limit for time, limit in zip(times, limits, strict=True)]),
            "peak_bytes": measure.peak_bytes(steps[name], device),
        }
        for name, times in seconds.items()
    }
    result = {
        "format": _FORMAT,
        "benchmark": "suite costs",
        "suite": suite.name,
        "machine": environment.machine(device),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "settings": {
            "device": device,
            "dtype": dtype,
            "batch": batch,
            "sequence": sequence,
            "rounds": rounds,
        },
        "methods": found,
    }
    path = root / f"{suite.name}-{torch.device(device).type}.json"
    write(result, path)
    return path


def read_costs(suite: str, device: str = "cpu", root: Path = COSTS) -> CostRun | None:
    """What was measured of a suite's methods, if anything was."""
    path = root / f"{suite}-{device}.json"
    if not path.exists():
        return None
    written = json.loads(path.read_text(encoding="utf-8"))
    return CostRun(*(written[name] for name in ("settings", "machine", "methods")))


def method_costs(suite: str) -> Mapping[str, Cost]:
    """By slug of a method, what was measured on the CPU; empty where nothing was."""
    measured = read_costs(suite)
    return measured.methods if measured else {}


class _Step:
    """A training step on the same batch again and again."""

    def __init__(self, model: nn.Module, batch: int, sequence: int, device: str) -> None:
        self.model = model.to(device).train()
        config: Any = self.model.config
        generator = torch.Generator().manual_seed(0)
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(5, vocabulary, (batch, sequence), generator=generator).to(device)
        has_head = getattr(config, "problem_type", None) is not None
        labels = torch.zeros(batch, dtype=torch.long, device=device) if has_head else ids
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW(trained, lr=1e-5)

    def freeze(self) -> None:
        """Train nothing; the gradient goes back to the embeddings, as it does in every method that trains the first layer."""
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda module, inputs, output: output.detach().requires_grad_()
        )
        self.optimizer = None

    def __call__(self) -> Tensor:
        loss: Tensor = self.model(**self.inputs).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def _build(recipe: Mapping[str, Any], dtype: str) -> nn.Module:
    from datasets import Dataset

    from turnrow.selection import needs_data
    from turnrow.tasks import ClassificationTask, make_task
    from turnrow.training.base import load_base
    from turnrow.training.methods import apply_method, check_method

    task = make_task(**recipe["task"])
    if isinstance(task, ClassificationTask):
        rows = {column: ["a", "b"] for column in task.input_columns()}
        task.fit(Dataset.from_dict({**rows, task.label: [0, 1]}))
    method = dict(recipe["method"])
    if needs_data(method.get("selection", "first")):
        del method["selection"]  # which rows they are costs nothing in a step
    base = load_base(recipe["model"], task, dtype=dtype, quantization=recipe.get("quantization"))
    return apply_method(base, check_method(method), task.peft_task_type)
