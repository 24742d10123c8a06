"""A suite: which methods are compared on which tasks, and all that their runs have in common, read from YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from turnrow.errors import UserError, near_matches

__all__ = ["EXPERIMENTS", "Cell", "Rates", "Suite", "load_suite", "suite_names"]

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
_SUITE = ("title", "settings", "groups")
_SETTINGS = ("recipe", "training_rows", "seeds", "learning_rates", "step", "tasks")


@dataclass(frozen=True)
class Rates:
    """The learning rates of every search of a suite."""

    grid: tuple[float, ...]
    """All that may be tried, ascending."""
    first: tuple[float, ...]
    """With which a search starts; it goes on beyond the best of them while that is the least or the greatest tried."""


@dataclass(frozen=True)
class Cell:
    """One method on one task: what a learning rate is searched for, and every seed run."""

    settings: str
    """Names what all runs have in common; runs of one method under one name are shared between suites."""
    task: str
    fields: Mapping[str, Any]
    """What the method changes of the recipe: its section ``method`` and perhaps others."""
    recipe: Mapping[str, Any]
    """Of its runs, without data, seed, learning rate and folder."""
    training_rows: int | None
    seeds: tuple[int, ...]
    rates: Rates

    @property
    def slug(self) -> str:
        """A folder's name from all that makes the method."""
        return _slug(self.fields)


@dataclass(frozen=True)
class Suite:
    """What `load_suite` read."""

    name: str
    title: str
    tasks: tuple[str, ...]
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By group, the methods by the name that tables give them."""
    _raw: Mapping[str, Any]

    @property
    def step(self) -> tuple[int, int]:
        """Rows of the training step whose cost is measured, and tokens a row."""
        return self._raw["step"]["batch"], self._raw["step"]["sequence"]

    def cell(self, task: str, method: Mapping[str, Any]) -> Cell:
        """The runs of a method, as `groups` has it, on a task."""
        raw = self._raw
        recipe = _merged(raw["recipe"], raw["tasks"][task] or {})
        recipe.setdefault("task", {"name": task})
        rates = Rates(*(tuple(map(float, raw["learning_rates"][name])) for name in ("grid", "first")))
        return Cell(
            raw["settings"],
            task,
            method,
            _merged(recipe, method),
            raw["training_rows"],
            tuple(raw["seeds"]),
            rates,
        )

    def cells(
        self,
        tasks: tuple[str, ...] | None = None,
        groups: tuple[str, ...] | None = None,
        names: tuple[str, ...] | None = None,
    ) -> Iterator[Cell]:
        """Every cell once, task by task in the order of the file; of all tasks, groups and methods, or of those named.

        Raises:
            UserError: there is no such task, group or method.
        """
        _check(tasks or (), self.tasks, f"suite {self.name!r} has no task")
        _check(groups or (), self.groups, f"suite {self.name!r} has no group")
        known = {name: fields for group in groups or self.groups for name, fields in self.groups[group].items()}
        _check(names or (), tuple(known), f"suite {self.name!r} has no method")
        # The same method may stand in several groups, under several names.
        wanted = {_slug(known[name]): known[name] for name in names or known}
        for task in tasks or self.tasks:
            for fields in wanted.values():
                yield self.cell(task, fields)

    def methods(self, groups: tuple[str, ...] | None = None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Every method once, by the first group and name that it has: (group, name, fields)."""
        seen = set()
        for group in groups or self.groups:
            for name, fields in self.groups[group].items():
                if (slug := _slug(fields)) not in seen:
                    seen.add(slug)
                    yield group, name, fields


def suite_names() -> list[str]:
    """The suites that there are."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read ``benchmarks/experiments/NAME.yaml`` and the settings that it names.

    Raises:
        UserError: there is no such suite, its file lacks a field or has one too many, or one name stands for two methods.
    """
    path = EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        known = suite_names()
        raise UserError(f"there is no suite {name!r}; there are {', '.join(known)}{near_matches(name, known)}")
    raw = _read(path, _SUITE)
    _check_names(raw["groups"], path)
    settings = _read(EXPERIMENTS / "settings" / f"{raw['settings']}.yaml", _SETTINGS)
    return Suite(name, raw["title"], tuple(settings["tasks"]), raw["groups"], {**settings, **raw})


def _slug(fields: Mapping[str, Any]) -> str:
    plain = re.sub(r'"(name|mode|method)": ', "", json.dumps(fields, sort_keys=True))
    return re.sub(r"[^\w.]+", "-", plain).strip("-")


def _read(path: Path, fields: tuple[str, ...]) -> dict[str, Any]:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check(raw, fields, f"{path.name} has an unknown field")
    if missing := [field for field in fields if field not in raw]:
        raise UserError(f"{path.name} lacks {', '.join(missing)}")
    return raw


def _check_names(groups: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    known: dict[str, Any] = {}
    for group, methods in groups.items():
        for name, fields in methods.items():
            if known.setdefault(name, fields) != fields:
                raise UserError(f"{path.name} has two methods of the name {name!r}, one of them in group {group!r}")


def _check(given: Any, allowed: Any, what: str) -> None:
    for name in given:
        if name not in allowed:
            raise UserError(f"{what} {name!r}; there are {', '.join(allowed)}{near_matches(str(name), allowed)}")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says; mappings are merged, but for a method, which is one thing."""
    merged = deepcopy(dict(base))
    for name, value in over.items():
        held = merged.get(name)
        both = isinstance(held, Mapping) and isinstance(value, Mapping) and name != "method"
        merged[name] = _merged(held, value) if both else deepcopy(value)  # type: ignore[arg-type]
    return merged
