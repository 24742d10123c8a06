"""Choose what RoCoFT trains by the first rows of the training split, for a run or for a file of indices."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from turnrow import RocoftConfig, select
from turnrow.errors import UserError
from turnrow.files import write_text
from turnrow.selection import Selection, needs_data
from turnrow.tasks import Task, make_task
from turnrow.training.arguments import training_arguments
from turnrow.training.base import input_limit, load_base
from turnrow.training.batches import collated, model_columns
from turnrow.training.folder import RunFolder
from turnrow.training.methods import apply_method
from turnrow.training.quiet import without_dataset_bars
from turnrow.training.recipe import Recipe
from turnrow.training.seeding import deterministic
from turnrow.training.splits import read_training

__all__ = ["calibrate", "select_indices", "write_indices"]

log = logging.getLogger(__name__)

_ADAPTER = "default"


def calibrate(
    model: nn.Module, encoded: Dataset, task: Task, tokenizer: Any, args: TrainingArguments, samples: int
) -> Selection | None:
    """Choose what the RoCoFT adapter of `model` trains, where its config selects by data.

    Args:
        model: as `apply_method` returned it; moved to the device of the run.
        encoded: the encoded training split.
        task: gives the collator.
        tokenizer: pads the batches.
        args: the seed of the order, the batch size and the device.
        samples: how many rows to look at: the first that training will see, all if there are fewer.

    Returns:
        What was chosen, or None where there was nothing to choose by data.
    """
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[_ADAPTER]
    if not isinstance(config, RocoftConfig) or not needs_data(config.selection):
        return None
    base: Any = model.get_base_model()
    base.to(args.device)
    rows = model_columns(encoded, model, task).select(_training_order(encoded, args)[:samples])
    batches = collated(rows, task.collator(tokenizer), args.per_device_train_batch_size)
    selection = select(model, batches, _ADAPTER)
    log.info("selected by %s on %s of %s training rows", config.selection, f"{len(rows):,}", f"{len(encoded):,}")
    return selection


def select_indices(recipe: Recipe, samples: int | None = None) -> Selection:
    """Choose what a run of `recipe` would train, without training.

    Args:
        recipe: its method must be rocoft, without indices.
        samples: how many training rows a selection by data looks at; None: what the recipe says.

    Raises:
        UserError: the recipe is of another method or names the indices already, or whatever training would refuse.
    """
    if recipe.method["name"] != "rocoft":
        raise UserError(f"method {recipe.method['name']!r} trains no rows or columns; select is for method rocoft")
    if recipe.method.get("indices") is not None:
        raise UserError("method.indices names already what is trained; leave it out to select anew")
    with deterministic(recipe.seed):
        task = make_task(**recipe.task)
        args = training_arguments(recipe, task, str(RunFolder(Path(recipe.output_dir)).checkpoints))
        table = read_training(recipe, task)["train"]
        task.fit(table)
        base = load_base(
            recipe.model,
            task,
            dtype=recipe.dtype,
            quantization=recipe.quantization,
            device_map=recipe.device_map,
            model_config=recipe.model_config,
        )
        model: Any = apply_method(base, recipe.method, task.peft_task_type)
        config = model.peft_config[_ADAPTER]
        if not needs_data(config.selection):
            return select(model, adapter_name=_ADAPTER)
        with without_dataset_bars(bool(args.disable_tqdm)):
            encoded = task.encode(table, base.tokenizer, input_limit(recipe.max_length, base), split="train")
        selection = calibrate(model, encoded, task, base.tokenizer, args, samples or recipe.calibration_samples)
        assert selection is not None
        return selection


def write_indices(path: Path, selection: Selection) -> None:
    """Write a file for `RocoftConfig.indices`, a line per module, whole or not at all."""
    held = selection.to_dict()
    modules = ",\n".join(f"    {json.dumps(name)}: {json.dumps(given)}" for name, given in held.pop("modules").items())
    head = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in held.items())
    write_text(path, f'{{\n{head}  "modules": {{\n{modules}\n  }}\n}}\n')


def _training_order(encoded: Dataset, args: TrainingArguments) -> list[int]:
    """The order of the rows in the first epoch: that of the sampler which Trainer, through accelerate, uses."""
    seed = args.seed if args.data_seed is None else args.data_seed
    return list(SeedableRandomSampler(encoded, data_seed=seed))
