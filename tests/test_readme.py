"""What the README shows is so: its Python runs and prints what it says, its commands, options and files exist."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from turnrow.cli.main import main
from turnrow.training import Recipe

ROOT = Path(__file__).parents[1]


class Block(NamedTuple):
    language: str
    code: str


BLOCKS = [
    Block(*found)
    for found in re.findall(
        r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]
PYTHON = [(block, following) for block, following in pairwise(BLOCKS) if block.language == "python"]
DISTRIBUTED = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
COMMANDS = [
    words[words.index("turnrow") + 1 :]
    for code in [
        *(block.code for block in BLOCKS if block.language == "bash"),
        *re.findall(r"^```bash\n(.*?)^```$", DISTRIBUTED, re.MULTILINE | re.DOTALL),
    ]
    for line in code.replace("\\\n", " ").splitlines()
    # Alone, or started by torchrun on several processes.
    if line.startswith(("turnrow ", "torchrun ")) and (words := shlex.split(line, comments=True))
]


@pytest.mark.parametrize(("block", "following"), PYTHON, ids=range(len(PYTHON)))
def test_python_runs_and_prints_what_it_says(block: Block, following: Block, capsys: pytest.CaptureFixture) -> None:
    exec(compile(block.code, "README.md", "exec"), {})
    assert capsys.readouterr().out == (following.code if following.language == "text" else "")


@functools.cache
def _help(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as page, pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    return page.getvalue().replace("\n", " ")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_and_options_exist(command: list[str]) -> None:
    name, *arguments = command
    overrides = list(dropwhile(lambda word: not word.startswith("--") or f"{word} " in _help(name), arguments))
    if name in ("train", "select"):
        assert Recipe.from_yaml(ROOT / arguments[arguments.index("--config") + 1], overrides)
    else:
        assert not overrides


def test_recipe_is_one() -> None:
    (text,) = (block.code for block in BLOCKS if block.language == "yaml")
    assert Recipe.from_dict(yaml.safe_load(text))


def test_files_that_it_links_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert all((ROOT / link).is_file() for link in links)
