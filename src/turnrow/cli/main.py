"""``turnrow COMMAND``: parsing, messages and exit codes; what a command does is in its own file."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from turnrow import __version__
from turnrow.errors import UserError, near_matches
from turnrow.training.processes import is_first, let_others_speak

__all__ = ["main"]

_COMMANDS = (
    "train",
    "probe",
    "plan",
    "select",
    "evaluate",
    "predict",
    "tasks",
    "inspect",
    "explain",
    "compose",
    "scale",
    "subtract",
    "interpolate",
    "regroup",
    "import_road",
    "extract",
    "merge",
    "export_lora",
    "serve",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        0 when it went well, 2 for bad input (the message is on stderr), 130 after Ctrl-C, 141 when the reader of our output
        went away.
    """
    parser, commands = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        options = [option for action in commands[args.command]._actions for option in action.option_strings]
        commands[args.command].error(f"unknown argument {rest[0]!r}{near_matches(rest[0].partition('=')[0], options)}")
    args.overrides = rest
    try:
        with _messages_on_stderr(), _other_processes_first(), warnings.catch_warnings():
            # Between peft and transformers; nothing that a user of the command line could mend.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if is_first():
            print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # For example `turnrow predict ... | head`. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="turnrow",
        description="Fine-tune transformers by training a few rows or columns of their weights (RoCoFT) or by turning "
        "pairs of their activations (RoAd).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"turnrow {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {}
    for command in map(_command, _COMMANDS):
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.HELP,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, takes_overrides=getattr(command, "TAKES_OVERRIDES", False))
        commands[command.NAME] = subparser
    return parser, commands


def _command(name: str) -> ModuleType:
    return import_module(f"turnrow.cli.{name}")


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Messages of turnrow (resumed from, deleted, finished) go to stderr as plain lines while a command runs.

    Of several processes the first one speaks for all.
    """
    logger = logging.getLogger("turnrow")
    level, propagate = logger.level, logger.propagate
    # Made anew for every command: a handler keeps the stderr of the moment it was made.
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_first() else logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def _other_processes_first() -> Iterator[None]:
    """One message for what goes wrong on several processes at once."""
    try:
        yield
    except Exception as error:
        let_others_speak(error)
        raise
