"""A recipe: everything that decides a fine-tuning run, as a frozen dataclass that round-trips to YAML.

```yaml
model: PATH_OR_HUB_ID
task: {name: classification, text: [sentence], label: label}
data: {train: FILE, validation: FILE, test: FILE}
method: {name: rocoft, mode: row, r: 3}
training: {learning_rate: 2e-3, num_train_epochs: 3, per_device_train_batch_size: 32}
seed: 0
output_dir: runs/sst2
```
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from turnrow.errors import UserError
from turnrow.files import write_text
from turnrow.tasks import CATALOG, make_task, split_files
from turnrow.training.options import check_names, check_options
from turnrow.training.yaml_values import YAML_MODE, load_yaml

__all__ = ["RECIPE_VERSION", "DataFiles", "Recipe", "recipe_help"]

RECIPE_VERSION = 1

# Without types of keys and values: with them jsonargparse would read the texts "1" and "no" of the file anew, as YAML.
Section: TypeAlias = dict

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """The three splits, each a local file (.jsonl, .json, .csv, .tsv, .parquet, text ones also .gz) or a hub id.

    Left out as a whole, they are those on the hub of the data set that the task names.
    """

    folder: str | None = None
    """A folder whose files are called after the splits: ``train.jsonl``, ``validation.csv.gz``, ...; for those not named here."""
    train: str | None = None
    """What is trained on."""
    validation: str | None = None
    """Evaluated while training, for the curve and for ``load_best_model_at_end``; may be left out."""
    test: str | None = None
    """Evaluated once before and once after training: the reported figures."""
    few_shot: Section | None = None
    """Train on few rows of each class, ``{k: 16, seed: 42}``, drawn from the training split; with ``validation: true`` as many
    others take the place of a validation split."""

    @property
    def splits(self) -> dict[str, str]:
        """The splits that are named, by name; in a `Recipe` the training and the test split always are."""
        return {name: source for name in _SPLITS if (source := getattr(self, name))}

    @property
    def validates(self) -> bool:
        """Whether there is a validation split, be it named or drawn from the training split."""
        return self.validation is not None or bool(self.few_shot and self.few_shot["validation"])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run.

    Raises:
        UserError: an unknown name anywhere (with near matches), a value of the wrong type or out of range.
    """

    model: str
    """Base model: a local folder, a hub id, or ``package:NAME`` for a model shipped in an installed Python package."""
    task: Section
    """The task's ``name``, a kind (``classification``, ...) or a data set (``cola``, ...), and its own fields, such as ``text`` and
    ``label``; ``turnrow tasks`` lists them."""
    method: Section
    """``rocoft``, ``road``, ``full``, ``head`` or any peft method by ``name``, and the fields of its config."""
    data: DataFiles = field(default_factory=DataFiles)
    """Where the train, validation and test rows are; by default on the hub, where the task is that of a known data set."""
    training: Section = field(default_factory=dict)
    """Arguments of ``transformers.TrainingArguments``, by their own names."""
    learning_rate_factors: Section | None = None
    """By how much ``training.learning_rate`` is multiplied for what is trained in some modules, ``{classifier: 0.1}``: parts of their names, or regular
    expressions for them; where several match, all factors count."""
    calibration_samples: int = 256
    """How many training rows a selection by data (``method.selection``) looks at: the first in the order of training."""
    reselection: Section | None = None
    """Train other rows or columns every so many steps: ``every``, ``strategy``, ``budget``, ``samples``; method rocoft."""
    max_length: int | None = None
    """Longest input in tokens, longer ones are cut; by default what the tokenizer and the model allow."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage type of the frozen base weights. Trained weights are always float32."""
    model_config: Section | None = None
    """Fields of the model's config that differ from what it was published with, such as ``{hidden_dropout_prob: 0.0}``."""
    device_map: int | str | Section | None = None
    """Where the weights are loaded to, shard by shard: a device (``cpu``, ``cuda:1``), ``auto``, or a mapping from modules
    to devices. By default to the memory of the host, from where the Trainer moves the model. Nothing may go to disk."""
    quantization: str | Section | None = None
    """Quantize the frozen linear layers while loading: ``nf4``, ``int8`` (bitsandbytes), ``torchao_int8``, ``torchao_int4``, or
    a mapping in the words of transformers' ``quantization_config``."""
    seed: int = 0
    """Seeds the new head, the order of the data and dropout."""
    output_dir: str
    """Folder of the run; created, and refused if it already holds one."""
    version: int = RECIPE_VERSION
    """Format of the recipe file."""

    def __post_init__(self) -> None:
        if self.version != RECIPE_VERSION:
            raise UserError(
                f"recipe version is {self.version!r}; this turnrow reads version {RECIPE_VERSION}. "
                "Install the turnrow that wrote the file, or write the recipe anew"
            )
        # Own copies: a frozen recipe must not change when the caller's dictionaries do.
        checked = {
            "data": _data_files(self.data, self.task),
            "task": _task_options(self.task),
            "method": _method_options(self.method),
            "training": _training_options(self.training),
            "learning_rate_factors": _rate_factors(self.learning_rate_factors),
            "device_map": deepcopy(self.device_map),
            "quantization": _quantization(self.quantization),
            "model_config": None if self.model_config is None else _section(self.model_config, "model_config"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.reselection is not None:
            from turnrow.training.reselection import Reselection

            checked_section = Reselection.from_dict(self.reselection, self.method)
            object.__setattr__(self, "reselection", asdict(checked_section))
        _check_scalars(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """Build from plain values, as read from YAML; `where` names their source in errors."""
        names = [f.name for f in fields(cls)]
        check_names(values, names, where)
        missing = [f for f in ("model", "task", "method", "output_dir") if values.get(f) is None]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply overrides of the command line.

        Relative paths of data files, of the model and of ``method.indices`` are looked up from the current directory, as a shell user expects,
        and, where there is nothing of that name, from the recipe's own folder. `output_dir` is always relative to the
        current directory.

        Args:
            path: the YAML file.
            overrides: arguments such as ``["--method.r", "4", "--training.learning_rate=1e-3"]``. A whole section is
                replaced by ``--method '{name: lora, r: 8}'``.

        Raises:
            UserError: no such file, broken YAML, or anything that `Recipe` itself refuses.
        """
        path = Path(path)
        return cls.from_dict(_relocate(_parse(path, overrides), path.parent), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the fields; ``Recipe.from_dict`` reads them back."""
        return asdict(self)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the recipe as YAML and, if `path` is given, write it there (atomically)."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
        if path is not None:
            write_text(Path(path), text)
        return text


def recipe_help() -> str:
    """The fields of a recipe with their descriptions, as ``--help`` shows arguments."""
    # The descriptions stand under the fields, where jsonargparse looks for them only when told to.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        return _parser().format_help()
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="turnrow train", exit_on_error=False, add_help=False, parser_mode=YAML_MODE)
    parser.add_argument("--config", action="config", help="the recipe file (YAML)")
    parser.add_class_arguments(Recipe)
    return parser


def _parse(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read the file, apply ``--a.b value`` and ``--a.b=value``; jsonargparse knows the syntax, we know near matches."""
    if not path.is_file():
        raise UserError(f"there is no recipe file {str(path)!r}; give --config the path of a YAML file")
    _check_file_names(path)
    for word in overrides:
        if word.startswith("--"):
            _check_override(word)
    try:
        namespace = _parser().parse_args(["--config", str(path), *overrides])
    except ArgumentError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    values = namespace.as_dict()
    del values["config"]
    return values


def _check_file_names(path: Path) -> None:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a mapping of recipe fields")
    check_names(values, [f.name for f in fields(Recipe)], str(path))
    if isinstance(values.get("data"), dict):
        check_names(values["data"], [f.name for f in fields(DataFiles)], f"{path}: data")


def _check_override(word: str) -> None:
    head, *rest = word.removeprefix("--").partition("=")[0].split(".")
    check_names({head: None}, [f.name for f in fields(Recipe)], f"{word}: the recipe")
    if head == "data" and rest:
        check_names({rest[0]: None}, [f.name for f in fields(DataFiles)], f"{word}: data")


def _data_files(data: Any, task: Any) -> DataFiles:
    """The splits, with what a folder or the hub supplies filled in."""
    if not isinstance(data, DataFiles):
        if not isinstance(data, Mapping):
            raise UserError(
                f"data is {data!r}; expected a mapping such as {{train: FILE, validation: FILE, test: FILE}} or {{folder: DIR}}"
            )
        data = DataFiles(**check_options(data, DataFiles, "data"))
    few_shot = _few_shot(data)
    given = data.splits
    if data.folder is not None:
        given = {**split_files(data.folder), **given}
    entry = CATALOG.get(str(task.get("name"))) if isinstance(task, Mapping) else None
    if not given and entry is not None:
        given = dict(entry.hub)
    for name in ("train", "test"):
        if name not in given:
            raise UserError(
                f"data.{name} is missing; name the file or hub id of the {name} split"
                + (f" (of {entry.name} the hub has {', '.join(entry.hub) or 'none'})" if entry is not None else "")
            )
    if few_shot is not None and few_shot["validation"]:
        given.pop("validation", None)
    return DataFiles(**given, few_shot=few_shot)


def _few_shot(data: DataFiles) -> dict[str, Any] | None:
    if data.few_shot is None:
        return None
    from turnrow.training.splits import FewShot

    section = FewShot.from_dict(data.few_shot)
    if section.validation and data.validation is not None:
        raise UserError(
            "data.validation names a validation split, and data.few_shot.validation draws one from the training split; leave one out"
        )
    return asdict(section)


def _section(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{name} is {values!r}; expected a mapping of fields")
    return deepcopy(dict(values))


def _task_options(task: Any) -> dict[str, Any]:
    options = _section(task, "task")
    if "name" not in options:
        raise UserError(
            "task has no name; say for example task: {name: classification, text: [sentence], label: label}"
        )
    make_task(**options)
    return options


def _method_options(method: Any) -> dict[str, Any]:
    from turnrow.training.methods import check_method

    return check_method(_section(method, "method"))


def _training_options(training: Any) -> dict[str, Any]:
    from turnrow.training.arguments import check_training

    return check_training(_section(training, "training"))


def _rate_factors(values: Any) -> dict[str, float] | None:
    from turnrow.training.rate_factors import check_rate_factors

    return None if values is None else check_rate_factors(values)


def _quantization(value: Any) -> Any:
    from turnrow.training.quantization import check_quantization

    return check_quantization(value)


def _check_scalars(recipe: Recipe) -> None:
    for name in ("model", "output_dir"):
        value: object = getattr(recipe, name)
        if not isinstance(value, str) or not value:
            raise UserError(f"{name} is {value!r}; expected a text that is not empty")
    if recipe.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {recipe.dtype!r}; allowed are float32, bfloat16, float16")
    if recipe.method["name"] == "full" and recipe.dtype != "float32":
        raise UserError(
            f"method full trains every weight and keeps what it trains in float32, but dtype is {recipe.dtype}; "
            "leave dtype out, and set training.bf16: true for mixed precision"
        )
    _check_device_map(recipe.device_map)
    if recipe.method["name"] == "full" and recipe.quantization is not None:
        raise UserError(
            f"method full trains every weight, and quantized ones cannot be trained, but quantization is {recipe.quantization!r}; "
            "leave quantization out, or train an adapter such as method: {name: rocoft, mode: row, r: 3}"
        )
    _check_integer("seed", recipe.seed, 0, 2**32 - 1)
    _check_integer("calibration_samples", recipe.calibration_samples, 1, 2**31 - 1)
    if recipe.max_length is not None:
        _check_integer("max_length", recipe.max_length, 1, 2**31 - 1)


def _check_device_map(device_map: Any) -> None:
    places = device_map.values() if isinstance(device_map, Mapping) else () if device_map is None else (device_map,)
    for place in places:
        if not isinstance(place, int | str) or isinstance(place, bool) or place == "":
            raise UserError(
                f"device_map holds {place!r}; expected a device such as cpu, cuda:0 or 0, 'auto', or a mapping from "
                "module names to devices"
            )
        if place in ("disk", "meta"):
            raise UserError(
                f"device_map sends weights to {place!r}, where no gradient reaches them; name devices that hold the whole "
                "model in memory, or take a smaller dtype"
            )


def _check_integer(name: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise UserError(f"{name} is {value!r}; expected an integer from {lowest} to {highest}")


def _relocate(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    def found(name: Any) -> Any:
        if not isinstance(name, str) or not name or Path(name).exists() or not (folder / name).exists():
            return name
        return os.path.normpath(folder / name)

    moved = values | {"model": found(values.get("model"))}
    for section, names in (("data", [f.name for f in fields(DataFiles)]), ("method", ["indices"])):
        if isinstance(held := values.get(section), dict):
            moved[section] = held | {name: found(held[name]) for name in names if name in held}
    return moved
