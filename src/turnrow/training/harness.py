"""Evaluation by EleutherAI's lm-evaluation-harness: its tasks, its prompts, its metrics, our adapted model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from turnrow.adapters import load_adapter, read_adapter
from turnrow.adapters.base_model import load_base, load_processor
from turnrow.errors import UserError, near_matches
from turnrow.pretrained import resolve_model
from turnrow.training.saved import TASK_FILE, load_saved

__all__ = ["evaluate_with_harness"]


def evaluate_with_harness(
    path: str | Path,
    tasks: Sequence[str],
    *,
    model: str | None = None,
    include: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> dict[str, Any]:
    """Run tasks of the harness on a saved adapter of a language model.

    Args:
        path: the folder of an adapter, of ``turnrow train`` or of peft alone.
        tasks: names of the harness, of tasks, groups or tags.
        model: where the base lies, if not where the adapter says.
        include: a folder with YAML files of tasks of your own.
        num_fewshot: examples in the prompt; None: what each task says.
        limit: rows of each task, for a quick look; None: all.
        batch_size: rows at once.
        chat: put the prompts into the tokenizer's form of conversations.

    Returns:
        ``results`` (by task, its metrics with their standard errors), ``versions`` of the tasks, ``n-shot`` and ``n-samples``, as the
        harness reports them, and ``harness``, its own version.

    Raises:
        UserError: the harness is not installed, a number is out of range, there is no such task or folder, the rows of one cannot be
            had, or the model is no language model.
    """
    _check_numbers(num_fewshot=(num_fewshot, 0), limit=(limit, 1), batch_size=(batch_size, 1))
    if not tasks:
        raise UserError(
            "no task of the harness is named; give one, or several joined by commas, such as 'arc_easy,piqa'"
        )
    if include is not None and not Path(include).is_dir():
        raise UserError(
            f"there is no folder {str(include)!r} with tasks of your own; give --include-path one that is there"
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("the evaluation harness is not installed; pip install 'turnrow[eval]'") from None
    manager = _manager(TaskManager, tasks, include)
    adapted, tokenizer = _language_model(Path(path), model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrapped = HFLM(pretrained=adapted.to(device), tokenizer=tokenizer, batch_size=batch_size, device=device)
    try:
        found: Any = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat,
            task_manager=manager,
        )
    except OSError as error:  # the rows are read from the hub, or a file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the harness cannot read what {', '.join(tasks)} asks for: {reason}") from error
    kept = {name: _plain(found[name]) for name in ("results", "versions", "n-shot", "n-samples")}
    return {**kept, "harness": lm_eval.__version__}


def _check_numbers(**given: tuple[int | None, int]) -> None:
    """Refuse numbers below the lowest that makes sense, by the name of the argument."""
    for name, (value, lowest) in given.items():
        if value is not None and value < lowest:
            raise UserError(f"{name} is {value}; expected a whole number from {lowest}")


def _language_model(path: Path, base: str | None) -> tuple[Any, Any]:
    model: Any
    tokenizer: Any
    if (path / TASK_FILE).is_file():
        saved = load_saved(path, base)
        model, tokenizer, what = saved.model, saved.tokenizer, f"the task {saved.task.name!r}"
    else:
        adapter = read_adapter(path)
        location = base or adapter.base_name
        if not location:
            raise UserError(f"{path} does not name its base model; say where it lies")
        location = resolve_model(location)
        model, tokenizer, what = load_adapter(load_base(adapter, location), path), load_processor(location), "its class"
    if tokenizer is None:
        raise UserError(f"there is no tokenizer with the base of {path}; name a base that has one")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not inner.can_generate():
        raise UserError(
            f"{path} adapts a {type(inner).__name__} ({what}), and the harness asks language models; evaluate it on rows of its own"
        )
    return model.eval(), tokenizer


def _manager(task_manager: Any, tasks: Sequence[str], include: str | Path | None) -> Any:
    """What finds the tasks; the thousands that come with the harness are only looked through where they are needed."""
    if include is not None:
        own = task_manager(include_path=str(include), include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    manager = task_manager(include_path=None if include is None else str(include))
    for name in tasks:
        if not manager.match_tasks([name]):
            broken = "" if include is None else _broken(Path(include))
            raise UserError(
                f"the harness has no task {name!r}{near_matches(name, manager.all_tasks)}; "
                f"{broken or 'a folder with tasks of your own goes with --include-path'}"
            )
    return manager


def _broken(folder: Path) -> str:
    """Which files with tasks cannot be read, and why: the harness leaves them out without a word."""
    reasons = {file: _unreadable(file) for file in sorted(folder.rglob("*.yaml"))}
    return "; ".join(f"{file} is not readable as YAML: {reason}" for file, reason in reasons.items() if reason)


def _unreadable(file: Path) -> str:
    try:
        yaml.compose(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return ""


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(name): _plain(held) for name, held in value.items()}
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    return float(value)
