"""What a run leaves for later: a folder that, with the base, is enough to evaluate and to predict.

Beside peft's own files (or, for the method ``full``, the whole model) lie the tokenizer, ``turnrow.json`` (what the
adapter is and which base it fits) and ``task.json``: the task with its labels, and how its numbers were computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from turnrow.adapters import load_adapter, write_manifest
from turnrow.errors import UserError
from turnrow.files import check_output, finite_or_null, whole_folder, write_json, write_lines
from turnrow.pretrained import without_load_report, without_weight_bars
from turnrow.tasks import Task, plain_columns, read_table, task_from_dict
from turnrow.training.base import load_base, load_tokenizer, prediction_limit
from turnrow.training.loss import use_loss_of
from turnrow.training.quiet import without_dataset_bars
from turnrow.training.recipe import Recipe
from turnrow.training.seeding import deterministic
from turnrow.training.trainer import predict_split

__all__ = [
    "SavedModel",
    "evaluate_adapter",
    "load_saved",
    "predict",
    "prediction_rows",
    "save_run",
    "saved_max_length",
    "saved_task",
    "write_predictions",
]

TASK_FILE = "task.json"
_VERSION = 1


@dataclass(frozen=True)
class SavedModel:
    """A trained model, loaded."""

    model: PreTrainedModel | PeftModel
    tokenizer: Any
    """What `Task.preparer` names: a tokenizer, an image processor, or a processor of both."""
    task: Task
    max_length: int | None
    """Longest input in tokens; None of images."""
    evaluation: dict[str, Any]
    """Training arguments on which the numbers of an evaluation depend, such as the batch size."""

    def predict(self, encoded: Dataset, split: str, *, progress: str | None = None) -> tuple[Any, Any]:
        """Return (predictions, labels or None) for the encoded rows of a split; `progress` labels a bar, None shows none."""
        with deterministic(0):
            output = predict_split(
                self.task, self.model, self.tokenizer, encoded, self.evaluation, split=split, progress=progress
            )
        return output.predictions, output.label_ids


def save_run(
    path: Path,
    trained: SavedModel,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the folder `path`, whole or not at all; an older one is replaced.

    Args:
        path: the folder.
        trained: what to save.
        recipe: for the name and the dtype of the base.
        provenance: JSON values kept in the manifest.
        state: the weights, of a model that is sharded over several processes; see `turnrow.adapters.whole_state_dict`.
    """
    with whole_folder(path) as folder, without_weight_bars():
        trained.model.save_pretrained(str(folder), state_dict=state)
        # peft's model card is a form with empty fields.
        (folder / "README.md").unlink(missing_ok=True)
        if isinstance(trained.model, PeftModel):
            _settle_config(folder / "adapter_config.json", recipe.model)
            write_manifest(folder, trained.model, **provenance)
        trained.tokenizer.save_pretrained(folder)
        described = {
            "version": _VERSION,
            "task": trained.task.to_dict(),
            "base": {
                "model": _portable(recipe.model),
                "dtype": recipe.dtype,
                "quantization": recipe.quantization,
                "model_config": recipe.model_config,
            },
            "method": recipe.method["name"],
            "max_length": trained.max_length,
            "evaluation": trained.evaluation,
        }
        write_json(folder / TASK_FILE, described)


def load_saved(path: str | Path, model: str | None = None) -> SavedModel:
    """Load what a run saved.

    Args:
        path: the run's ``adapter`` folder.
        model: where the base lies now, if not where it was when it was trained on.

    Raises:
        UserError: no such folder, not written by ``turnrow train``, altered files, or another base.
    """
    folder = Path(path)
    described = _read_description(folder)
    task = task_from_dict(described["task"])
    name = model or described["base"]["model"]
    if (folder / "adapter_config.json").is_file():
        held = described["base"]
        settings = {key: held.get(key) for key in ("quantization", "model_config")}
        base = load_base(name, task, dtype=held["dtype"], adapted=True, **settings)
        adapted: PreTrainedModel | PeftModel = load_adapter(base.model, folder)
    elif model is not None:
        raise UserError(f"{folder} holds a whole model, which needs no base; leave out the model {model!r}")
    else:
        with without_load_report():
            adapted = getattr(transformers, task.auto_model).from_pretrained(folder, dtype=torch.float32)
        use_loss_of(task, adapted)
    tokenizer = load_tokenizer(str(folder), task.preparer)
    return SavedModel(adapted.eval(), tokenizer, task, described["max_length"], described["evaluation"])


def saved_task(path: str | Path) -> Task:
    """The task of a saved adapter, without loading any weights."""
    return task_from_dict(_read_description(Path(path))["task"])


def saved_max_length(path: str | Path) -> int | None:
    """The longest input of a saved adapter in tokens, without loading any weights; None of images."""
    length: int | None = _read_description(Path(path))["max_length"]
    return length


def evaluate_adapter(
    path: str | Path, data: str, *, split: str = "test", model: str | None = None, quiet: bool = False
) -> dict[str, float]:
    """Metrics of a saved adapter on labelled rows; on the run's own test split, exactly the run's figures.

    Args:
        path: the run's ``adapter`` folder.
        data: a local file or a hub id.
        split: which split of a hub data set.
        model: where the base lies now, if it has moved.
        quiet: no progress bar.
    """
    saved = load_saved(path, model)
    with without_dataset_bars(quiet):
        # Whatever it is called where it comes from: here it is evaluated, and of some tasks "train" is encoded otherwise.
        table = saved.task.in_our_form(read_table(data, split))
        encoded = saved.task.encode(table, saved.tokenizer, saved.max_length, split="test")
    predictions, labels = saved.predict(encoded, "test", progress=None if quiet else "evaluating")
    return saved.task.metrics(predictions, labels, encoded)


def predict(
    path: str | Path,
    data: str | Sequence[Mapping[str, Any]],
    *,
    split: str = "test",
    output: str | Path | None = None,
    model: str | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Predictions of a saved adapter; labels are not needed.

    Args:
        path: the run's ``adapter`` folder.
        data: a local file or a hub id, or the rows themselves, such as ``[{"sentence": "A fine film."}]``.
        split: which split of a hub data set.
        output: also write the rows there, atomically: as JSON lines, or where the name ends in ``.json`` as one list.
        model: where the base lies now, if it has moved.
        quiet: no progress bar.

    Returns:
        One row per example: the task's columns as far as the data have them, and what the task makes of the prediction.

    Raises:
        UserError: as of `load_saved`; or no file can be written at `output`.
    """
    if output is not None:
        check_output(Path(output), "output")
    saved = load_saved(path, model)
    given = read_table(data, split) if isinstance(data, str) else Dataset.from_list([dict(row) for row in data])
    table = saved.task.in_our_form(given)
    with without_dataset_bars(quiet):
        limit = prediction_limit(saved.task, saved.max_length, saved.model)
        encoded = saved.task.encode(table, saved.tokenizer, limit, split="predict")
    predictions, _ = saved.predict(encoded, "predict", progress=None if quiet else "predicting")
    rows = prediction_rows(saved.task, table, encoded, predictions)
    if output is not None:
        write_predictions(Path(output), rows)
    return rows


def prediction_rows(task: Task, table: Dataset, encoded: Dataset, predictions: np.ndarray) -> list[dict[str, Any]]:
    """Each example's columns of the task, but for bytes, followed by what the task makes of its prediction."""
    columns = [name for name in task.columns() if name in plain_columns(table)]
    decoded = task.decode(predictions, encoded)
    # A table without columns has no rows.
    rows = table.select_columns(columns) if columns else [{}] * len(table)
    return [{**row, **result} for row, result in zip(rows, decoded, strict=True)]


def write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, or where the name ends in ``.json`` as one list, atomically."""
    if path.name.lower().endswith(".json"):
        write_json(path, list(rows))
        return
    write_lines(path, [json.dumps(finite_or_null(row), ensure_ascii=False) + "\n" for row in rows])


def _read_description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"there is no adapter folder {str(folder)!r}; give the folder 'adapter' of a run")
    try:
        described = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        inner = folder / "adapter"
        hint = (
            f"; did you mean {str(inner)!r}?"
            if (inner / TASK_FILE).is_file()
            else ", so turnrow train did not write it"
        )
        raise UserError(f"{str(folder)!r} has no {TASK_FILE}{hint}") from None
    except ValueError as error:
        raise UserError(f"{folder / TASK_FILE} is not readable as JSON: {error}") from None
    if described.get("version") != _VERSION:
        raise UserError(
            f"{folder / TASK_FILE} has version {described.get('version')!r}; this turnrow reads version {_VERSION}"
        )
    return described


def _settle_config(config_file: Path, base_name: str) -> None:
    """Name the base as the user did, not the folder where its files lay, and write sets in one order."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    # peft keeps the patterns as sets, whose order differs from process to process.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    write_json(config_file, config)


def _portable(model: str) -> str:
    """A local folder is found again from any current directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
