"""What `turnrow explain` puts together: the files of an adapter, its base, texts, and what the analyses make of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnrow.cli._base import base_of
from turnrow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from turnrow.adapters import AdapterFile, WeightChange
    from turnrow.analysis.displacement import Displacement
    from turnrow.analysis.explain import Explanation, TokenRanking, WeightMovement

__all__ = ["explain"]

Report = Callable[[str], Any]
"""Told what is being done."""


def explain(args: argparse.Namespace, report: Report) -> Explanation:
    """Explain what the arguments of the command name.

    Raises:
        UserError: the adapter, the base or the texts cannot be used.
    """
    folder = Path(args.adapter)
    is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    if args.no_base and _asks_for_texts(args):
        raise UserError("--no-base leaves no model to run texts through: leave one of them out")
    _check_texts(args, folder)
    return _of_model(args, report) if is_model else _of_adapter(args, report)


def _check_texts(args: argparse.Namespace, folder: Path) -> None:
    """What can be refused is refused before a large model is loaded."""
    if args.texts:
        _lines(args.texts)
    if args.data and folder.is_dir() and not (folder / "task.json").is_file():
        raise UserError(
            f"--data reads rows by the task that turnrow train saves beside an adapter, and {folder} has no task.json: give --texts FILE"
        )


def _of_adapter(args: argparse.Namespace, report: Report) -> Explanation:
    from turnrow.adapters import (
        adapter_changes,
        load_adapter,
        load_base,
        merged_changes,
        original_weights,
        read_adapter,
        reads_without_base,
    )
    from turnrow.adapters.checks import check_against_model, check_base, check_finite
    from turnrow.pretrained import without_load_report

    adapter = read_adapter(args.adapter)
    if adapter.lies_beside:
        raise UserError(
            f"{adapter.path} is a {adapter.method} adapter, which changes no weight of its base: it puts tokens before the text. explain is for "
            "adapters that change weights"
        )
    check_finite(adapter)
    facts = {"adapter": str(adapter.path), "method": adapter.method, "settings": _settings(adapter)}
    model, location = None, ""
    if not args.no_base:
        location = base_of(adapter, args.base)
        facts["base"] = args.base or adapter.base_name or location
        report("reading the base")
        with without_load_report():
            model = _loaded(lambda: load_base(adapter, location)).eval()
        if reads_without_base(adapter):
            check_against_model(adapter, model)
            if not args.no_check_base:
                check_base(adapter, model)
    weights: list[WeightMovement] = []
    if reads_without_base(adapter):
        weights = _measured(adapter_changes(adapter, model), report)
    elif model is None:
        adapter_changes(adapter)  # says what is missing
    displacement, ranking = None, None
    if model is not None and (_asks_for_texts(args) or not weights):
        originals = {} if weights else original_weights(adapter, model)
        adapted = load_adapter(model, adapter.path, check_base=not args.no_check_base).eval()
        if not weights:
            weights = _measured(merged_changes(adapted, originals), report)
        if _asks_for_texts(args):
            displacement, ranking = _run_texts(args, adapter.path, location, adapted, None, report)
    if not weights:
        raise UserError(f"{adapter.path} is a {adapter.method} adapter that changes no weight of its base")
    return _explanation(facts, weights, adapter.saved_modules, displacement, ranking)


def _of_model(args: argparse.Namespace, report: Report) -> Explanation:
    from turnrow.adapters import model_changes
    from turnrow.pretrained import resolve_model, without_load_report

    if args.base is None:
        raise UserError(f"{args.adapter} holds a whole model: give the model that it was made of (--base MODEL)")
    location = resolve_model(args.base)
    found = model_changes(args.adapter, location)
    weights = _measured(found.changes, report)
    if not weights:
        raise UserError(f"the models in {args.adapter} and {args.base} hold the same weights")
    displacement, ranking = None, None
    if _asks_for_texts(args):
        from transformers import AutoModel

        with without_load_report():
            tuned, base = (
                _loaded(lambda place=place: AutoModel.from_pretrained(place, dtype="auto"))  # type: ignore[misc]
                for place in (args.adapter, location)
            )
        displacement, ranking = _run_texts(args, Path(args.adapter), location, tuned, base, report)
    facts = {"adapter": args.adapter, "method": "a whole model", "base": args.base}
    return _explanation(facts, weights, found.unmatched, displacement, ranking)


def _explanation(
    facts: Mapping[str, Any],
    weights: list[WeightMovement],
    whole: Iterable[str],
    displacement: Displacement | None,
    ranking: TokenRanking | None,
) -> Explanation:
    from turnrow.analysis.explain import Explanation

    return Explanation.of(
        {**facts, **_sizes(displacement)},
        weights,
        whole=whole,
        displacement=displacement,
        tokens=ranking.most(100) if ranking else (),
        texts=ranking.texts if ranking else (),
    )


def _measured(changes: Iterable[WeightChange], report: Report) -> list[WeightMovement]:
    from turnrow.analysis.explain import measure

    found = []
    for change in changes:
        report(f"measuring {change.name}")
        found.append(
            measure(
                change.name,
                change.delta,
                change.weight,
                shape=change.shape,
                parts=change.parts,
                blocks=change.blocks,
            )
        )
    return found


def _run_texts(
    args: argparse.Namespace,
    folder: Path,
    location: str,
    adapted: nn.Module,
    base: nn.Module | None,
    report: Report,
) -> tuple[Displacement, TokenRanking]:
    from turnrow.analysis.displacement import displacement
    from turnrow.analysis.explain import TokenRanking

    tokenizer = _tokenizer(folder, location)
    batches = _of_data(args, folder, tokenizer, adapted) if args.data else _of_texts(args, tokenizer, adapted)
    ranking = TokenRanking(lambda token: _word(tokenizer, token))
    report("running the texts with it and without it")
    found = displacement(
        adapted, _for_decoder(batches, adapted), base, special_ids=tokenizer.all_special_ids, on_batch=ranking.add
    )
    return found, ranking


def _tokenizer(folder: Path, location: str) -> Any:
    from turnrow.adapters import load_processor
    from turnrow.tasks import ready_to_pad, tokenizer_of

    tokenizer = tokenizer_of(load_processor(str(folder)) or load_processor(location))
    if tokenizer is None:
        raise UserError(f"neither {folder} nor the base has a tokenizer to read texts with")
    return ready_to_pad(tokenizer)


def _of_texts(args: argparse.Namespace, tokenizer: Any, model: Any) -> Iterator[Mapping[str, Tensor]]:
    from turnrow.tasks import resolve_max_length
    from turnrow.training.base import position_limit

    limit = min(resolve_max_length(tokenizer, None), position_limit(model) or sys.maxsize)
    texts = (args.text or _lines(args.texts))[: args.rows]
    for start in range(0, len(texts), args.batch_size):
        some = texts[start : start + args.batch_size]
        yield dict(tokenizer(some, padding=True, truncation=True, max_length=limit, return_tensors="pt"))


def _of_data(args: argparse.Namespace, folder: Path, tokenizer: Any, model: Any) -> Iterator[Mapping[str, Tensor]]:
    """Rows as the task of the adapter encodes them."""
    from turnrow.tasks import read_table
    from turnrow.training.base import prediction_limit
    from turnrow.training.quiet import without_dataset_bars
    from turnrow.training.saved import saved_max_length, saved_task

    task = saved_task(folder)
    if task.preparer != "AutoTokenizer":
        raise UserError(
            f"the adapter in {folder} was trained on images, and only texts can be compared: give --text or --texts"
        )
    table = task.in_our_form(read_table(args.data, args.split))
    table = table.select(range(min(args.rows, len(table))))
    limit = prediction_limit(task, saved_max_length(folder), model)
    with without_dataset_bars():
        encoded = task.encode(table, tokenizer, limit, split="predict")
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded.column_names]
    rows = iter(encoded.select_columns(names))
    while chunk := list(islice(rows, args.batch_size)):
        yield dict(tokenizer.pad(chunk, return_tensors="pt"))


def _for_decoder(batches: Iterable[Mapping[str, Tensor]], model: Any) -> Iterator[Mapping[str, Tensor]]:
    """With the token that a decoder starts from, of a model that reads by an encoder."""
    start = getattr(model.config, "decoder_start_token_id", None)
    for batch in batches:
        if getattr(model.config, "is_encoder_decoder", False) and start is not None:
            batch = {**batch, "decoder_input_ids": batch["input_ids"].new_full((len(batch["input_ids"]), 1), start)}
        yield batch


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the texts in {path} cannot be read: {error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{path} holds no text: write one a line")
    return texts


def _word(tokenizer: Any, token: int) -> str:
    """A token as a person reads it: bytes decoded, and its space kept visible."""
    name = tokenizer.convert_ids_to_tokens(token)
    return name if token in tokenizer.all_special_ids else name.replace("Ġ", "␣").replace("▁", "␣").replace("Ċ", "⏎")


def _loaded(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise UserError(
                f"{error}; --base MODEL names another, --no-base looks at the adapter's files alone"
            ) from error
        raise UserError(f"a model cannot be loaded: {error}") from error


def _asks_for_texts(args: argparse.Namespace) -> bool:
    return bool(args.text or args.texts or args.data)


def _settings(adapter: AdapterFile) -> str:
    shown = (
        "mode",
        "r",
        "density",
        "variant",
        "group_size",
        "blocks",
        "within",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "bias",
    )
    held = {name: adapter.config[name] for name in shown if adapter.config.get(name) not in (None, False, "none")}
    return ", ".join(f"{name}={value}" for name, value in held.items() if isinstance(value, (str, int, float)))


def _sizes(displacement: Displacement | None) -> dict[str, str]:
    return {} if displacement is None else {"texts": f"{displacement.texts:,}"}
