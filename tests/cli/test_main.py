from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import turnrow
import turnrow_command
from turnrow.cli import evaluate
from turnrow.cli.main import main
from turnrow.errors import UserError

EVALUATE = ["evaluate", "--adapter", "x", "--data", "y"]


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    logger = logging.getLogger("turnrow")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def replace_run(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(evaluate, "run", run)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for command in ("train", "select", "evaluate", "predict", "inspect", "merge", "export-lora"):
        assert f"    {command}" in printed


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"turnrow {turnrow.__version__}\n"


def test_bad_input_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(monkeypatch, UserError("the file is empty"))
    assert main(EVALUATE) == 2
    assert capsys.readouterr().err == "error: the file is empty\n"


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_run(monkeypatch, KeyboardInterrupt("go on with --resume"))
    assert main(EVALUATE) == 130
    assert capsys.readouterr().err == "\ngo on with --resume\n"


def test_errors_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_run(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(EVALUATE)


def test_an_unknown_argument_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*EVALUATE, "--modell=z"])
    assert caught.value.code == 2
    assert "unknown argument '--modell=z'; did you mean '--model'" in capsys.readouterr().err


def test_names_are_not_completed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--adapt", "x", "--data", "y"])
    assert "--adapter" in capsys.readouterr().err


def test_ctrl_c_while_the_package_is_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "turnrow.cli.main", Interrupted("turnrow.cli.main"))
    assert turnrow_command.main() == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_the_command_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["turnrow", *EVALUATE, "--nowhere"])
    with pytest.raises(SystemExit, match="2"):
        turnrow_command.main()
    assert "unknown argument '--nowhere'" in capsys.readouterr().err


def test_optional_packages_say_nothing_while_they_are_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> int:
        logging.getLogger("torchao.quantization").warning("of the run")
        return 0

    class Talkative(ModuleType):
        def __getattr__(self, name: str) -> object:
            logging.getLogger("torchao").warning("no kernel")
            logging.getLogger("bitsandbytes.backends").warning("no kernel")
            return run

    monkeypatch.setitem(sys.modules, "turnrow.cli.main", Talkative("turnrow.cli.main"))
    assert turnrow_command.main() == 0
    assert caplog.messages == ["of the run"]
