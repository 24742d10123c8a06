"""The project holds to its own rules: rooms, light imports, one version, pins that fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="tomllib came with Python 3.11")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Libraries that take long to import and that no one needs who only wants `import turnrow` or `turnrow --help`.
HEAVY = [
    "accelerate",
    "datasets",
    "fastapi",
    "jinja2",
    "matplotlib",
    "openai",
    "pandas",
    "prometheus_client",
    "pyarrow",
    "scipy",
    "sklearn",
    "tensorboard",
    "trl",
    "uvicorn",
]


def _requirements(path: Path) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def _modules_after(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_rooms_import_from_lower_floors_only() -> None:
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(cache_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_brings_no_heavy_library_beyond_what_peft_brings_and_leaves_the_gpu_alone() -> None:
    # The command line imports the package itself first. Each interpreter takes seconds to start.
    ours = _modules_after("import turnrow.cli.main, torch\nassert not torch.cuda.is_initialized()")
    assert not (ours - _modules_after("import peft")) & set(HEAVY)


def test_version_is_the_same_everywhere() -> None:
    import turnrow

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert turnrow.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_pins_lie_within_the_supported_range(constraints: str) -> None:
    supported = {r.name.lower(): r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    for pin in _requirements(ROOT / constraints):
        version = re.fullmatch(r"==([\w.]+)", str(pin.specifier))
        assert version, f"{constraints}: {pin} pins no single version"
        assert version[1] in supported.get(pin.name.lower(), pin.specifier), f"{constraints}: {pin} is not supported"


def test_every_direct_dependency_is_pinned() -> None:
    pinned = {r.name.lower() for r in _requirements(ROOT / "constraints.txt")}
    groups = PROJECT["optional-dependencies"].values()
    direct = {Requirement(text).name.lower() for group in [PROJECT["dependencies"], *groups] for text in group}
    assert pinned == direct
