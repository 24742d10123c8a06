"""Check that every method answers as its merged models do, then time all of them, pass by pass in turn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.methods import sharing_copy
from benchmarks.results import spread
from benchmarks.serving.methods import BASE, METHODS, write_adapters
from benchmarks.serving.served import InEngine, Served, serve
from benchmarks.serving.turns import take_turns
from turnrow.adapters import load_adapter

__all__ = ["Load", "WrongAnswer", "check_answers", "measure_load", "merged"]

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""How far below the best logit that of a chosen token may lie, in standard deviations of the logits: rounding decides between equals."""

_CHECKED = 2
"""Requests whose answers are checked: the first and the last, of different adapters."""

Load = tuple[int, int]
"""Tokens of a prompt, and new tokens."""


class WrongAnswer(RuntimeError):
    """A method's tokens are not those of the merged model; nothing of it is timed."""


def measure_load(
    base: PreTrainedModel,
    methods: Sequence[str],
    targets: list[str],
    root: Path,
    load: Load,
    *,
    requests: int,
    adapters: Sequence[int],
    rounds: int,
    peer_rounds: int,
    batch_tokens: int,
    clock: str,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Measure a load.

    Args:
        base: the model, frozen.
        methods: names of `METHODS`.
        targets: names of the layers that adapters are for.
        root: a folder for their files; what is there is used.
        load: of every request.
        requests: in a batch.
        adapters: how many different ones share a batch, ascending.
        rounds: of all methods in the engine.
        peer_rounds: the first of these, in which also those of peft run.
        batch_tokens: in a step of the engine.
        clock: one of `turns.CLOCKS`.
        seed: of prompts and order.

    Returns:
        For each method the `parameters` of one adapter, the `gap` of its answers (see `check_answers`), and for each number of
        adapters `seconds`, and `ratio`, the base model's time by the method's, of those that took turns together; of what runs in the engine also
        the `steps` of a batch.

    Raises:
        WrongAnswer: a method does not compute what it should.
    """
    device = str(base.device)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, base.config.vocab_size, (requests, load[0]), generator=generator).to(device)
    entries: dict[str, dict[str, Any]] = {}
    batches: dict[tuple[str, int], tuple[Served, list[int | None]]] = {}
    with ExitStack() as stack:
        for name in methods:
            folders, parameters = _files(name, base, targets, root, max(adapters), seed)
            served = serve(name, base, folders, prompts, load[1], batch_tokens)
            stack.enter_context(closing(served))
            counts = adapters if folders else [0]
            for count in counts:
                batches[name, count] = served, [place % count if count else None for place in range(requests)]
            gap = check_answers(name, served, base, folders, prompts, batches[name, counts[-1]][1])
            entries[name] = {"parameters": parameters, "gap": gap, "adapters": {str(count): {} for count in counts}}
        seconds = _interleaved(batches, adapters, rounds, peer_rounds, device=device, seed=seed, clock=clock)
        for (name, count), found in seconds.items():
            served, _ = batches.get((name, count)) or batches[name, 0]
            if (name, count) not in batches and count != adapters[-1]:
                continue  # the base model beside fewer adapters
            ratios = [limit / own for own, limit in zip(found, seconds[BASE, count], strict=False)]
            entry = entries[name]["adapters"][str(count if (name, count) in batches else 0)]
            entry.update(seconds=spread(found), ratio=spread(ratios))
            if isinstance(served, InEngine):
                entry["steps"] = served.steps
    return entries


def _files(
    name: str, base: PreTrainedModel, targets: list[str], root: Path, count: int, seed: int
) -> tuple[list[Path], int]:
    """The folders of a method's adapters, and the parameters of one."""
    method = METHODS[name]
    if method.config is None:
        return [], 0
    place = root / (method.files or name)
    note = place / "parameters"
    if not note.exists():
        parameters = write_adapters(method, base, targets, place, count, seed)
        note.write_text(str(parameters))
    return [place / str(number) for number in range(count)], int(note.read_text())


def _interleaved(
    batches: Mapping[tuple[str, int], tuple[Served, list[int | None]]],
    adapters: Sequence[int],
    rounds: int,
    peer_rounds: int,
    *,
    device: str,
    seed: int,
    clock: str,
) -> dict[tuple[str, int], list[float]]:
    """Seconds by round of each method and number of adapters, after a round to warm up; those of peft only in the first `peer_rounds`.

    The methods that share a number of adapters take turns. Those without adapters are the base model: in the engine it takes part
    each time, and by `generate` beside the largest number.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    shuffle = random.Random(seed).shuffle
    for number in range(-1, rounds):
        for count in adapters:
            own = {name: batch for (name, its), batch in batches.items() if its == count}
            own |= {
                name: batch
                for (name, its), batch in batches.items()
                if its == 0 and (name == BASE or count == adapters[-1])
            }
            names = [name for name in own if METHODS[name].where == "engine" or number < peer_rounds]
            shuffle(names)
            found = take_turns(own, names, clock=clock, device=device)
            if number >= 0:
                for name, one in found.items():
                    seconds.setdefault((name, count), []).append(one)
    return seconds


# --- what is checked before ----------------------------------------------------------------------------------------------


@torch.no_grad()
def check_answers(
    name: str,
    served: Served,
    base: PreTrainedModel,
    folders: Sequence[Path],
    prompts: Tensor,
    adapters: Sequence[int | None],
) -> float:
    """Hold the first and the last answer of a batch against the merged models, each for its request alone.

    Every token must be the most likely one to the merged model given what was answered before, but for rounding; then the answer
    is what the merged model generates, or parts from it where two tokens are equally likely.

    Returns:
        How far below the best logit that of a token lies at most, in standard deviations of the logits.

    Raises:
        WrongAnswer: further than rounding explains; or an adapter changes nothing, so that nothing could be seen.
    """
    served.begin(adapters)
    answers = served.answer()
    tolerance = TOLERANCE[str(base.dtype).removeprefix("torch.")]
    worst = 0.0
    for place in sorted({0, len(prompts) - 1})[:_CHECKED]:
        number = adapters[place]
        alone = merged(base, None if number is None else folders[number])
        gap = _gap(alone, prompts[place], answers[place])
        if not gap <= tolerance:
            raise WrongAnswer(
                f"{name}: request {place}, adapter {number}: a token lies {gap:.2g} standard deviations of the logits below that of "
                f"the merged model, more than {tolerance:g}"
            )
        if number is not None and _gap(base, prompts[place], answers[place]) <= tolerance:
            raise WrongAnswer(
                f"{name}: adapter {number} answers as the base model does, so that nothing can be checked"
            )
        worst = max(worst, gap)
    return worst


def merged(base: PreTrainedModel, folder: Path | None) -> PreTrainedModel:
    """A copy of the model with the adapter of a folder merged into its weights; without one, the model."""
    if folder is None:
        return base
    own = sharing_copy(base)
    for parameter in own.parameters():
        parameter.data = parameter.data.clone()
    return load_adapter(own, folder).merge_and_unload().eval()


def _gap(model: PreTrainedModel, prompt: Tensor, answer: Sequence[int]) -> float:
    whole = torch.cat((prompt, torch.tensor(answer, device=prompt.device)))
    logits = model(input_ids=whole[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, whole[len(prompt) :, None]).squeeze(1)
    return ((logits.max(-1).values - chosen) / logits.std(-1)).max().item()
