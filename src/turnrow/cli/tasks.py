"""``turnrow tasks``: the kinds of task and the data sets that a recipe can name."""

from __future__ import annotations

import argparse

from turnrow.errors import UserError, near_matches

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "tasks"
HELP = "list the kinds of task and the data sets that a recipe can name, or show one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a kind of task or a data set; default: list all")


def run(args: argparse.Namespace) -> int:
    """Print the list, or what a recipe may say of one task."""
    from rich.table import Table

    from turnrow.cli.console import table_console
    from turnrow.tasks import CATALOG, TASKS

    if args.name is None:
        kinds = Table("kind", "what it is", "metrics, the main one first", title="Kinds of task", title_justify="left")
        for name, kind in sorted(TASKS.items()):
            kinds.add_row(name, _first_line(kind), ", ".join(kind.metric_names))
        sets = Table("name", "what is asked", "kind", title="Data sets", title_justify="left")
        for name, entry in sorted(CATALOG.items()):
            sets.add_row(name, entry.title, str(entry.task["name"]))
        table_console().print(kinds, "", sets, "", "turnrow tasks NAME shows one; a recipe says task: {name: NAME}")
    elif args.name in CATALOG:
        _show_entry(args.name)
    elif args.name in TASKS:
        _show_kind(args.name)
    else:
        raise UserError(
            f"there is no task {args.name!r}; turnrow tasks lists them{near_matches(args.name, [*TASKS, *CATALOG])}"
        )
    return 0


def _show_entry(name: str) -> None:
    import yaml

    from turnrow.tasks import CATALOG

    entry = CATALOG[name]
    print(f"{entry.title}\n\n{entry.source}" + (f"\n{entry.notes}" if entry.notes else ""))
    shown = {"task": dict(entry.task), "data": dict(entry.hub)}
    print(
        f"\ntask: {{name: {name}}} stands for\n\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120)}",
        end="",
    )


def _show_kind(name: str) -> None:
    import dataclasses
    import inspect

    from turnrow.tasks import TASKS

    kind = TASKS[name]
    print(inspect.cleandoc(kind.__doc__ or ""))
    print("\nOptions:")
    for field in dataclasses.fields(kind):
        if field.init:
            print(f"  {field.name}: {_type(field.type)}{_default(field)}")


def _type(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(field: object) -> str:
    import dataclasses

    assert isinstance(field, dataclasses.Field)
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return "" if field.default_factory is dataclasses.MISSING else f" = {field.default_factory()!r}"


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
