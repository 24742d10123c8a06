"""One fine-tuning run: from a recipe to a folder with everything that came of it."""

from __future__ import annotations

import json
import logging
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerState, TrainingArguments

from turnrow import __version__, count_parameters
from turnrow.adapters import whole_state_dict
from turnrow.files import finite_or_null, write_json, write_lines
from turnrow.pretrained import without_weight_bars
from turnrow.selection import Selection
from turnrow.tasks import Task, make_task
from turnrow.training.arguments import evaluation_arguments, kept_checkpoints, training_arguments
from turnrow.training.base import input_limit, load_base, prediction_limit
from turnrow.training.batches import model_columns
from turnrow.training.calibration import calibrate
from turnrow.training.checkpoints import (
    SaveAfterEvaluation,
    SealAndRotate,
    check_processes,
    discard_incomplete,
    last_complete,
)
from turnrow.training.folder import RunFolder
from turnrow.training.interrupt import Interrupted, StopOnInterrupt
from turnrow.training.measure import peak_memory, reset_peak_memory
from turnrow.training.methods import apply_method
from turnrow.training.processes import from_first, is_first
from turnrow.training.progress import ProgressBars
from turnrow.training.quantization import quantization_package
from turnrow.training.quiet import without_dataset_bars
from turnrow.training.rank_allocation import rank_allocation
from turnrow.training.rate_factors import check_rate_patterns
from turnrow.training.recipe import Recipe
from turnrow.training.reselection import Reselect, Reselection
from turnrow.training.saved import SavedModel, prediction_rows, save_run, write_predictions
from turnrow.training.seeding import deterministic
from turnrow.training.splits import read_splits
from turnrow.training.trainer import make_trainer
from turnrow.tuners import check_reselection, unite

__all__ = ["RunResult", "train"]

log = logging.getLogger(__name__)

_METRICS_VERSION = 1
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: RunFolder
    """Where everything lies."""
    metrics: dict[str, Any]
    """The contents of ``metrics.json``."""

    @property
    def adapter(self) -> Path:
        """The folder for `evaluate_adapter`, `predict` and ``PeftModel.from_pretrained``."""
        return self.folder.adapter


@dataclass(frozen=True)
class _Split:
    table: Dataset
    encoded: Dataset


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Fine-tune as `recipe` says, and evaluate on the test split before and after.

    Started by ``torchrun``, all processes train and evaluate together; the first one writes the folder, and the figures are its.

    Args:
        recipe: what to do.
        resume: continue the run that ``recipe.output_dir`` holds from its last complete checkpoint; on CPU, with the same
            number of threads, the result is the same to the last bit as without the interruption. A finished run is
            returned as it is; where there is no run, one is started.
        overwrite: delete what a former run wrote there, once the new one is ready to start.

    Returns:
        Where the results lie, and the figures.

    Raises:
        UserError: anything wrong with the recipe, the data, the model or the folder; or (`NonFiniteError`) a loss that is
            not finite.
        Interrupted: Ctrl-C; the text says how to go on.
    """
    folder = RunFolder(Path(recipe.output_dir))
    if is_first():
        folder.check(recipe, resume=resume, overwrite=overwrite)
    task = make_task(**recipe.task)
    # From here on the processes know of each other.
    args = training_arguments(recipe, task, str(folder.checkpoints))
    finished = from_first(_read_metrics(folder) if resume else None)
    if finished is not None:
        log.info("the run in %s is finished already", folder.root)
        return RunResult(folder, finished)
    with deterministic(recipe.seed):
        return _run(recipe, task, args, folder, overwrite=overwrite)


def _run(recipe: Recipe, task: Task, args: TrainingArguments, folder: RunFolder, *, overwrite: bool) -> RunResult:
    tables = read_splits(recipe, task)
    task.fit(tables["train"])
    base = load_base(
        recipe.model,
        task,
        dtype=recipe.dtype,
        quantization=recipe.quantization,
        device_map=recipe.device_map,
        model_config=recipe.model_config,
    )
    limit = input_limit(recipe.max_length, base)
    # What could never be predicted with is refused before it is trained.
    prediction_limit(task, limit, base.model)
    shows = is_first() and not args.disable_tqdm
    with without_dataset_bars(not shows):
        splits = {
            name: _Split(table, task.encode(table, base.tokenizer, limit, split=name)) for name, table in tables.items()
        }
    model = apply_method(base, recipe.method, task.peft_task_type)
    check_rate_patterns(model, recipe.learning_rate_factors or {})
    # Anew when a run is resumed too: what its checkpoint holds then takes the place of the choice, which is the same.
    selection = calibrate(model, splits["train"].encoded, task, base.tokenizer, args, recipe.calibration_samples)
    current = SavedModel(model, base.tokenizer, task, limit, evaluation_arguments(args))
    reselection = _reselection(recipe, task, base.tokenizer, splits["train"].encoded, model, args)

    checkpoint = from_first(_open(folder, recipe, args, overwrite=overwrite) if is_first() else None)
    before, _ = _evaluate(current, splits["test"], "test, before" if shows else None)
    interrupt = StopOnInterrupt()
    bars = ProgressBars(task.main_metric, "validation")
    trainer = make_trainer(
        task,
        model,
        base.tokenizer,
        args,
        train=splits["train"].encoded,
        validation=splits["validation"].encoded if "validation" in splits else None,
        callbacks=[
            *rank_allocation(model),
            *reselection,
            SealAndRotate(kept_checkpoints(recipe)),
            interrupt,
            SaveAfterEvaluation(),
            *([bars] if shows else []),
        ],
        rate_factors=recipe.learning_rate_factors,
    )
    reset_peak_memory(args.device)
    try:
        with interrupt.listening(), without_weight_bars():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt as stop:
        raise Interrupted(_how_to_go_on(str(stop) or "interrupted", folder)) from None
    finally:
        bars.close()
    memory, memory_kind = peak_memory(args.device)
    trained = count_parameters(model).trainable
    if recipe.reselection is not None:
        unite(model)  # type: ignore[arg-type]
    if task.settles:
        held = splits["validation"].encoded
        task.settle(*current.predict(held, "validation", progress="validation" if shows else None), held)
    after, rows = _evaluate(current, splits["test"], "test, after" if shows else None)

    counts = count_parameters(model)
    metrics = {
        "version": _METRICS_VERSION,
        "model": recipe.model,
        "task": task.name,
        "method": recipe.method["name"],
        "quantization": recipe.quantization,
        "main_metric": task.main_metric,
        "greater_is_better": task.greater_is_better,
        "before": before,
        "after": after,
        "trainable_parameters": trained,
        "total_parameters": counts.total,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "checkpoint_step": _chosen_step(trainer),
        "resumed_from_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        "processes": args.world_size,
        "seconds_per_step": _seconds_per_step(trainer.state),
        "peak_memory_bytes": memory,
        "peak_memory_kind": memory_kind,
        "selection": _selection_figures(selection, recipe, len(splits["train"].table)),
        "rows": {name: len(split.table) for name, split in splits.items()},
        "device": _device(args.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "turnrow": __version__,
            "python": sys.version.split()[0],
            **{name: version(name) for name in (*_PACKAGES, *quantization_package(recipe.quantization))},
        },
        "seed": recipe.seed,
    }
    state = whole_state_dict(model)
    if is_first():
        _write(folder, recipe, current, state, metrics, trainer.state.log_history, rows)
    # The others' timings differ; and nobody returns before the files are there.
    return RunResult(folder, from_first(metrics))


def _read_metrics(folder: RunFolder) -> dict[str, Any] | None:
    return json.loads(folder.metrics.read_text(encoding="utf-8")) if folder.metrics.exists() else None


def _reselection(
    recipe: Recipe, task: Task, tokenizer: Any, encoded: Dataset, model: Any, args: TrainingArguments
) -> list[Reselect]:
    """The callback that the recipe's section ``reselection`` asks for, if there is one."""
    if recipe.reselection is None:
        return []
    settings = Reselection.from_dict(recipe.reselection, recipe.method)
    # Once more, now that its targets are known: fused experts may be among them.
    check_reselection(model.peft_config["default"], settings.strategy, settings.budget)
    rows = model_columns(encoded, model, task)
    return [Reselect(settings, rows, task.collator(tokenizer), args.per_device_train_batch_size, recipe.seed)]


def _open(folder: RunFolder, recipe: Recipe, args: TrainingArguments, *, overwrite: bool) -> Path | None:
    """Make the folder that of this run, and return the checkpoint to go on from; those cut short are deleted."""
    if overwrite:
        folder.clear()
    folder.open(recipe)
    for broken in discard_incomplete(folder.checkpoints):
        log.warning("%s was cut short and is deleted", broken)
    checkpoint = last_complete(folder.checkpoints)
    if checkpoint is not None:
        check_processes(checkpoint, args.world_size)
        log.info("resuming from %s", checkpoint)
    return checkpoint


def _evaluate(
    current: SavedModel, split: _Split, progress: str | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    predictions, labels = current.predict(split.encoded, "test", progress=progress)
    metrics = current.task.metrics(predictions, labels, split.encoded)
    return metrics, prediction_rows(current.task, split.table, split.encoded, predictions)


def _how_to_go_on(what: str, folder: RunFolder) -> str:
    checkpoint = last_complete(folder.checkpoints)
    kept = f"{checkpoint} is kept" if checkpoint else "no checkpoint had been written yet"
    return f"{what}; {kept}. Go on with the same recipe and --resume"


def _chosen_step(trainer: Trainer) -> int:
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        return trainer.state.best_global_step
    return trainer.state.global_step


def _seconds_per_step(state: TrainerState) -> float | None:
    """Median over the log entries, so that the first steps, which warm up, do not count."""
    seconds = [entry["seconds_per_step"] for entry in state.log_history if "seconds_per_step" in entry]
    return statistics.median(seconds) if seconds else None


def _selection_figures(selection: Selection | None, recipe: Recipe, rows: int) -> dict[str, Any] | None:
    """How what is trained was chosen by data; the mean is over the modules."""
    if selection is None:
        return None
    shares = [chosen.share for chosen in selection if chosen.share is not None]
    return {
        "strategy": selection.strategy,
        "calibration_samples": min(recipe.calibration_samples, rows),
        "mean_share_of_scores": statistics.mean(shares) if shares else None,
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write(
    folder: RunFolder,
    recipe: Recipe,
    current: SavedModel,
    state: dict[str, torch.Tensor] | None,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    """Write the results; ``metrics.json`` last, since it says that the run is finished."""
    from turnrow.training.curve import draw_curve
    from turnrow.training.report import write_report

    # For whoever gets the adapter alone: what it was trained with and how well it did. No timings and no place of this
    # run, so that the same run gives the same files.
    kept = {name: value for name, value in recipe.to_dict().items() if name != "output_dir"}
    figures = finite_or_null({name: metrics[name] for name in ("before", "after")})
    save_run(folder.adapter, current, recipe, provenance={"recipe": kept, "metrics": figures}, state=state)
    write_predictions(folder.predictions, rows)
    write_lines(folder.history, [json.dumps(finite_or_null(entry)) + "\n" for entry in history])
    draw_curve(folder.curve, history, metrics)
    write_report(folder.report, folder.curve, recipe, metrics, rows)
    write_json(folder.metrics, metrics)
