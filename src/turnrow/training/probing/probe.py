"""Rank methods by their kernels on a few rows, before any training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from turnrow.analysis.ntk import (
    Everything,
    KernelLogisticRegression,
    TangentKernels,
    relative_distance,
    tangent_kernels,
)
from turnrow.errors import UserError
from turnrow.tasks import Task, make_task
from turnrow.training.arguments import training_arguments
from turnrow.training.base import input_limit, load_base
from turnrow.training.methods import check_method, method_title
from turnrow.training.planning import plan
from turnrow.training.probing.candidates import probe_candidates
from turnrow.training.probing.cost import step_seconds
from turnrow.training.probing.data import Sample, Source, draw
from turnrow.training.probing.figures import MethodProbe, Probe
from turnrow.training.probing.kernels import attached, candidate
from turnrow.training.probing.outputs import Function, function_of
from turnrow.training.recipe import Recipe
from turnrow.training.seeding import deterministic
from turnrow.training.splits import read_split

__all__ = ["probe"]

_FULL = "full"
_BATCH = 32
"""Rows of a batch of the kernel pass; its size changes no number."""


@dataclass
class _Found:
    """What is known of one method so far."""

    method: dict[str, Any]
    parameters: int | None = None
    scores: list[float] = field(default_factory=list)
    distances: dict[str, list[float]] = field(default_factory=lambda: {"p = 1": [], "p = 2": []})
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)


def probe(
    recipe: Recipe,
    *,
    methods: Sequence[Mapping[str, Any]] | None = None,
    shots: int = 16,
    draws: int | Sequence[int] = 3,
    rows: int = 200,
    measure_steps: bool = True,
    block_bytes: int = 2**31,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Probe:
    """Rank methods on the data and model of a recipe, before any training.

    For each draw of training rows the tangent kernels of all methods are found in one pass, a kernel logistic regression that starts from
    the model's own outputs is trained on each, its penalty chosen by cross-validation, and held-out rows are scored by the task's main
    metric. The test split is not read.

    Args:
        recipe: as for `train`, of a classification or of classes by a prompt; its own method is one of those compared.
        methods: `method` sections to compare instead; the kernel of full fine-tuning is always there to measure distances from.
        shots: training rows of each class in a draw.
        draws: how many, or the seed of each; their spread says how far to trust a difference.
        rows: held-out rows to score on: of the validation split if the recipe names one, else other rows of the training split.
        measure_steps: time a training step of each method on a batch of the recipe's size.
        block_bytes: see `turnrow.analysis.ntk.tangent_kernels`.
        on_stage: told what is done next.

    Raises:
        UserError: a number is out of range, or the recipe, the task, its data or the model is not one that a probe knows. A single method
            that cannot be probed has a note instead.
    """
    _check_number("shots", shots, 2)  # of one there is no cross-validation
    if not isinstance(draws, Sequence):
        _check_number("draws", draws, 1)
        draws = range(recipe.seed, recipe.seed + draws)
    _check_number("rows", rows, 1)
    start = time.perf_counter()
    with deterministic(recipe.seed):
        on_stage("reading data and model")
        task = make_task(**recipe.task)
        args = training_arguments(recipe, task, recipe.output_dir)
        source = _source(recipe, task)
        function = function_of(task, source.base)
        model: Any = source.base.model
        model.to(args.device).eval()
        compared = _methods(recipe, methods, function)
        starts, samples = [], None
        for number, seed in enumerate(draws, start=1):
            on_stage(f"draw {number} of {len(draws)}: kernels of {len(compared)} methods")
            samples = draw(source, shots, rows, seed, _BATCH)
            starts.append(_one_draw(source, function, samples, compared, block_bytes))
        assert samples is not None
        size = args.per_device_train_batch_size
        longest = _longest(samples, size)
        if measure_steps:
            _measure(source, compared, longest, args, on_stage)
        tokens = int(longest["input_ids"].shape[1])
        peaks = _peaks(recipe, compared, size, tokens, on_stage)
    probed = [
        MethodProbe(
            title=title,
            method=found.method,
            trainable_parameters=found.parameters,
            scores=tuple(found.scores),
            distances={p: tuple(values) for p, values in found.distances.items() if values},
            step_seconds=found.seconds,
            peak_bytes=peaks[title],
            note="; ".join(dict.fromkeys(found.notes)) or None,
        )
        for title, found in compared.items()
    ]
    return Probe(
        model=recipe.model,
        task=task.dataset or task.name,
        metric=task.main_metric,
        outputs=function.words,
        shots=shots,
        held_rows=len(samples[1].classes),
        held_from=source.held_from,
        seeds=tuple(draws),
        start_scores=tuple(starts),
        batch=size,
        sequence=tokens,
        device=str(args.device),
        threads=torch.get_num_threads(),
        seconds=time.perf_counter() - start,
        methods=tuple(sorted(probed, key=_promise)),
    )


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; expected a whole number from {least}")


def _source(recipe: Recipe, task: Task) -> Source:
    train = read_split(recipe, task, "train")
    held = read_split(recipe, task, "validation") if "validation" in recipe.data.splits else None
    task.fit(train)
    if recipe.quantization is not None:
        raise UserError(
            "a probe needs the weights as they are; leave quantization out of the recipe, or give --quantization null"
        )
    base = load_base(recipe.model, task, dtype=recipe.dtype, model_config=recipe.model_config)
    return Source(train, held, task, base, input_limit(recipe.max_length, base))


def _methods(recipe: Recipe, methods: Sequence[Mapping[str, Any]] | None, function: Function) -> dict[str, _Found]:
    """By title."""
    chosen = (
        probe_candidates(recipe.method, function.model) if methods is None else [check_method(one) for one in methods]
    )
    if not chosen:
        raise UserError("methods is empty; name at least one, or leave it out")
    found: dict[str, _Found] = {}
    for method in chosen:
        title = base = method_title(method)
        number = 2
        while title in found:
            title, number = f"{base} ({number})", number + 1
        found[title] = _Found(method)
    return found


def _one_draw(
    source: Source, function: Function, samples: tuple[Sample, Sample], compared: dict[str, _Found], block_bytes: int
) -> float:
    """Score every method on one draw; returns the score of the outputs before training."""
    few, held = samples
    descriptions: dict[str, Any] = {"": Everything()}
    for title, found in compared.items():
        try:
            one = candidate(source.base, found.method, source.task.peft_task_type, few.labelled, function.strip)
        except UserError as error:
            found.notes.append(str(error))
            continue
        descriptions[title], found.parameters = one.description, one.trainable_parameters
    kernels = tangent_kernels(
        function.model, few.batches, descriptions, function.fit(few), held.batches, block_bytes=block_bytes
    )
    for title, found in compared.items():
        if title in kernels:
            found.scores.append(_score(kernels, title, few, held, source.task))
            for p in (1, 2):
                found.distances[f"p = {p}"].append(relative_distance(kernels[title], kernels[""], p=p))
    return source.task.metrics(kernels.other_outputs, held.labels, held.encoded)[source.task.main_metric]


def _score(kernels: TangentKernels, title: str, few: Sample, held: Sample, task: Task) -> float:
    kernel = kernels[title]
    classifier = KernelLogisticRegression(lam="cv").fit(kernel.train, few.classes, offset=kernels.train_outputs)
    odds = classifier.predict_proba(kernel.other, offset=kernels.other_outputs)
    logits = np.log(np.maximum(odds, np.finfo(float).tiny))
    return task.metrics(logits, held.labels, held.encoded)[task.main_metric]


def _longest(samples: tuple[Sample, Sample], size: int) -> dict[str, Any]:
    """A batch of `size` rows as long as the longest that was drawn, repeated if there are fewer."""
    batch = max((one for sample in samples for one in sample.labelled), key=lambda one: one["input_ids"].shape[1])
    rows = torch.arange(size) % len(batch["input_ids"])
    return {name: value[rows] if torch.is_tensor(value) else value for name, value in batch.items()}


def _measure(
    source: Source, compared: dict[str, _Found], batch: dict[str, Any], args: TrainingArguments, on_stage: Callable
) -> None:
    for title, found in compared.items():
        if found.parameters is None:
            continue
        on_stage(f"a training step of {title}")
        # A step takes as long whichever rows are trained, and the choice has no data here.
        method = {name: value for name, value in found.method.items() if name != "selection"}
        found.seconds = step_seconds(attached(source.base, method, source.task.peft_task_type), batch, args)


def _peaks(
    recipe: Recipe, compared: dict[str, _Found], size: int, tokens: int, on_stage: Callable
) -> dict[str, int | None]:
    """Forecast of each method's memory, by title."""
    planned = plan(
        replace(recipe, quantization=None),
        batches=[size],
        sequence=tokens,
        methods=[found.method for found in compared.values()],
        on_method=lambda title: on_stage(f"memory of {title}"),
    )
    return {
        title: one.batches[0].peak_bytes if one.batches else None
        for title, one in zip(compared, planned.methods, strict=True)
    }


def _promise(one: MethodProbe) -> tuple[float, float]:
    """Better scores first; of equal ones the nearest kernel."""
    return (-one.score if one.score is not None else float("inf"), one.distance(2) or 0.0)
