"""Two tasks in one model: an adapter each, on parts of their own or on all of every layer, alone and together.

What is trained is an encoder with a linear head a task on the mean of its last hidden states. Both heads are kept apart; composing
concerns the encoder alone. The RoAd paper shows this for one layer of a language model by examples (Liao et al., NeurIPS 2024,
section 4.4); here it is measured.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.suite.search import next_rates
from benchmarks.suite.suite import Rates
from turnrow import RoadConfig, RocoftConfig

__all__ = ["KINDS", "SETUPS", "Rows", "Setup", "read_rows", "run_seed", "search_rate"]

EPOCHS = 4
RATES = Rates(grid=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), first=(1e-3, 3e-3, 1e-2))
BATCH = 32
_LENGTH = 64
_WARM_UP = 0.1

KINDS = {
    "alone, half": "an adapter a task, each on a half of every layer, used alone",
    "composed, halves": "the same two adapters, both on",
    "alone, whole": "an adapter a task, each on all of every layer, used alone",
    "composed, whole": "the same two adapters, both on",
    "joint": "one adapter trained on both tasks at once",
}


@dataclass(frozen=True)
class Setup:
    """A method and where it is applied."""

    name: str
    configure: Callable[[str | None], PeftConfig]
    """The config for a part of every layer, or for all of it."""
    has_parts: bool = True


_ONE_LAYER = r".*layer\.3\.output\.dense"

SETUPS: tuple[Setup, ...] = (
    Setup("RoAd1", lambda part: RoadConfig(variant="road_1", target_modules="all-linear", blocks=part)),
    Setup("RoAd1, one layer", lambda part: RoadConfig(variant="road_1", target_modules=_ONE_LAYER, blocks=part)),
    Setup("RoCoFT rows r=3", lambda part: RocoftConfig(r=3, within=part)),
    Setup(
        "LoRA r=1, added",
        lambda part: LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"),
        has_parts=False,
    ),
)


@dataclass(frozen=True)
class Rows:
    """A split of a task."""

    texts: list[str]
    labels: Tensor
    """(n,) int64."""


def read_rows(path: str | Path) -> Rows:
    """The rows of a file of the task's folder."""
    import gzip

    raw = Path(path).read_bytes()
    lines = (gzip.decompress(raw) if str(path).endswith(".gz") else raw).splitlines()
    rows = [json.loads(line) for line in lines]
    return Rows([row["sentence"] for row in rows], torch.tensor([int(row["label"]) for row in rows]))


class _Tasks(nn.Module):
    """The encoder with its adapters, and a head a task."""

    encoder: PeftModel

    def __init__(self, encoder: PeftModel, tokenizer: Any, labels: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        hidden: Any = encoder.config.hidden_size
        self.heads = nn.ModuleDict({task: nn.Linear(hidden, count) for task, count in labels.items()})

    def forward(self, task: str, texts: Sequence[str]) -> Tensor:
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
        states = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        return self.heads[task]((states * mask).sum(1) / mask.sum(1))


def run_seed(
    setup: Setup,
    encoder: PreTrainedModel,
    tokenizer: Any,
    data: Mapping[str, Mapping[str, Rows]],
    rate: float,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Train and evaluate every kind of `KINDS` that the setup has, with one seed.

    Args:
        encoder: the pretrained model; it is copied.
        data: by task, its splits "train" and "test".

    Returns:
        By kind, accuracy on the test split by task.
    """
    first, second = data
    found: dict[str, dict[str, float]] = {}
    pairs = {"half": (":50%", "50%:"), "whole": (None, None)}
    for size, parts in pairs.items():
        if size == "half" and not setup.has_parts:
            continue
        model = _fresh(setup, encoder, tokenizer, data, dict(zip(data, parts, strict=True)), seed)
        for task in data:
            model.encoder.set_adapter(task)
            _train(model, {task: data[task]["train"]}, rate, seed)
        found[f"alone, {size}"] = {task: _alone(model, task, data[task]["test"]) for task in data}
        model.encoder.base_model.set_adapter([first, second])  # type: ignore[operator]
        both = "composed, halves" if size == "half" else "composed, whole"
        found[both] = {task: _accuracy(model, task, data[task]["test"]) for task in data}
    model = _fresh(setup, encoder, tokenizer, data, {"joint": None}, seed)
    _train(model, {task: splits["train"] for task, splits in data.items()}, rate, seed)
    found["joint"] = {task: _accuracy(model, task, data[task]["test"]) for task in data}
    return found


def search_rate(
    setup: Setup, encoder: PreTrainedModel, tokenizer: Any, data: Mapping[str, Mapping[str, Rows]]
) -> dict[float, float]:
    """By learning rate, the mean accuracy over the tasks on their validation splits, each trained alone on all of every layer."""
    found: dict[float, float] = {}
    while wanted := next_rates(found, RATES):
        for rate in wanted:
            scores = []
            for task, splits in data.items():
                model = _fresh(setup, encoder, tokenizer, data, {task: None}, seed=0)
                _train(model, {task: splits["train"]}, rate, seed=0)
                scores.append(_accuracy(model, task, splits["validation"]))
            found[rate] = sum(scores) / len(scores)
    return found


def _fresh(
    setup: Setup,
    encoder: PreTrainedModel,
    tokenizer: Any,
    data: Mapping[str, Mapping[str, Rows]],
    adapters: Mapping[str, str | None],
    seed: int,
) -> _Tasks:
    torch.manual_seed(seed)
    (name, part), *others = adapters.items()
    model = get_peft_model(copy.deepcopy(encoder), setup.configure(part), adapter_name=name)
    for name, part in others:
        model.add_adapter(name, setup.configure(part))
    labels = {task: int(splits["train"].labels.max()) + 1 for task, splits in data.items()}
    return _Tasks(model, tokenizer, labels)


def _train(model: _Tasks, data: Mapping[str, Rows], rate: float, seed: int) -> None:
    """Epochs of batches that alternate between the tasks; only their heads, and the adapter that is on, are trained."""
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    trained += [p for task in data for p in model.heads[task].parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(EPOCHS) for batch in _batches(data, generator)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, len(batches)))
    model.train()
    for task, texts, labels in batches:
        nn.functional.cross_entropy(model(task, texts), labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _linear(step: int, steps: int) -> float:
    warm_up = math.ceil(_WARM_UP * steps)
    return (step + 1) / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)


def _batches(data: Mapping[str, Rows], generator: torch.Generator) -> Iterator[tuple[str, list[str], Tensor]]:
    orders = {task: _by_length(rows.texts, generator) for task, rows in data.items()}
    for at in range(max(map(len, orders.values()))):
        for task, order in orders.items():
            if at < len(order):
                rows = data[task]
                yield task, [rows.texts[i] for i in order[at].tolist()], rows.labels[order[at]]


def _by_length(texts: Sequence[str], generator: torch.Generator) -> list[Tensor]:
    """Random batches of texts of like length: fewer tokens of padding."""
    batches: list[Tensor] = []
    for drawn in torch.randperm(len(texts), generator=generator).split(8 * BATCH):
        ordered = sorted(drawn.tolist(), key=lambda i: len(texts[i]))
        batches += torch.tensor(ordered).split(BATCH)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _alone(model: _Tasks, task: str, rows: Rows) -> float:
    model.encoder.set_adapter(task)
    return _accuracy(model, task, rows)


@torch.no_grad()
def _accuracy(model: _Tasks, task: str, rows: Rows) -> float:
    order = sorted(range(len(rows.texts)), key=lambda i: len(rows.texts[i]))
    right = 0
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        predicted = model(task, [rows.texts[i] for i in chosen]).argmax(-1)
        right += int((predicted == rows.labels[chosen]).sum())
    return right / len(order)
