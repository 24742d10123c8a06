"""What a batch costs in which every sample has an adapter of its own, against the same batch through the base model alone.

Every sample of the batch gets another adapter, by peft's ``adapter_names``. Three kinds of work:

- ``prompt``: several tokens a sample, one call of the model;
- ``token``: one token a sample, one call of the model;
- ``decoding``: one token a sample after cached ones, as inside ``generate``, where the names are resolved once for all steps.

Every method sees the same base weights (shared storage), the same inputs and the same linear layers to adapt. Adapters have
random values. Before anything is timed each method's output is compared, for the first and the last sample, with that sample run
alone. The calls run interleaved, each method once per round in shuffled order; a ratio is taken within a round.

    python -m benchmarks.mixed_batch --output benchmarks/results/mixed-llama-cpu.json
    python -m benchmarks.mixed_batch --show benchmarks/results/mixed-llama-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, RoadConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks import measure
from benchmarks.arguments import add_result, add_shape, add_threads, check_positive
from benchmarks.methods import LORA_RANK, RANK, sharing_copy, with_road_of_peft
from benchmarks.results import provenance, spread, write
from benchmarks.shapes import SHAPES, Shape, build_model, target_names
from benchmarks.table import origin
from turnrow import RocoftConfig

__all__ = ["BASE", "GOALS", "METHODS", "main", "markdown", "measure_mixed_batch"]

FORMAT = 1
BASE = "base"
_SEED = 0
_WARM_UP = 2

# How far a sample in the batch may lie from the sample alone, relative to the largest entry.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    title: str
    config: Callable[[list[str]], PeftConfig]
    wrap: Callable[..., PeftModel] = get_peft_model


METHODS: dict[str, Method] = {
    "rows": Method(f"RoCoFT rows r={RANK}", lambda t: RocoftConfig(r=RANK, target_modules=t, init_weights=False)),
    "columns": Method(
        f"RoCoFT columns r={RANK}",
        lambda t: RocoftConfig(r=RANK, mode="column", target_modules=t, init_weights=False),
    ),
    "road_1": Method("RoAd1", lambda t: RoadConfig(variant="road_1", target_modules=t, init_weights=False)),
    "road_1_neighbours": Method(
        "RoAd1, group_size=2",
        lambda t: RoadConfig(variant="road_1", group_size=2, target_modules=t, init_weights=False),
    ),
    "road_4": Method("RoAd4", lambda t: RoadConfig(variant="road_4", target_modules=t, init_weights=False)),
    "lora": Method(
        f"LoRA r={LORA_RANK} (peft)",
        lambda t: LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=t, init_lora_weights=False),
    ),
    "road_peft": Method(
        "RoAd1 (peft)",
        lambda t: RoadConfig(variant="road_1", target_modules=t, init_weights=False),
        with_road_of_peft,
    ),
}

# (method, work, least share of the base model's throughput)
GOALS: tuple[tuple[str, str, float], ...] = (
    ("road_1", "prompt", 0.95),
    ("road_1_neighbours", "prompt", 0.95),
    ("rows", "prompt", 0.92),
    ("columns", "prompt", 0.92),
    *(
        (method, work, 0.85)
        for work in ("token", "decoding")
        for method in ("road_1", "road_1_neighbours", "rows", "columns")
    ),
)
"""What the project set itself for 32 adapters on the ``llama`` shape in float32 on a CPU, 16 tokens a sample."""


class Served:
    """A model that serves a batch in which sample i has adapter i; without names, the base model."""

    def __init__(self, model: PreTrainedModel | PeftModel, names: list[str] | None) -> None:
        # Both classes have what is asked of them below; as modules they would type every attribute as a tensor.
        self.model: Any = model
        self.names = names or []

    def __call__(self, ids: Tensor) -> Tensor:
        names = {"adapter_names": self.names} if self.names else {}
        return self.model(input_ids=ids, **names).logits

    @contextmanager
    def decoding(self, prompt: Tensor, token: Tensor) -> Iterator[Callable[[], Tensor]]:
        """A step of decoding after `prompt`; it leaves the cache as it was."""
        model = self.model
        with model._enable_peft_forward_hooks(adapter_names=self.names) if self.names else _nothing():
            inner = model.get_base_model() if self.names else model
            cache = DynamicCache(config=inner.config)
            inner(input_ids=prompt, past_key_values=cache, use_cache=True)

            def step() -> Tensor:
                logits = inner(input_ids=token, past_key_values=cache, use_cache=True).logits
                cache.crop(-token.shape[1])
                return logits

            yield step


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def serve(method: Method, base: PreTrainedModel, targets: list[str], adapters: int) -> Served:
    """Return the model of `method` with that many adapters, frozen as loaded ones are."""
    names = [f"adapter{number}" for number in range(adapters)]
    model = method.wrap(base, method.config(targets), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, method.config(targets))
    return Served(model.eval().requires_grad_(False), names)


@torch.no_grad()
def measure_mixed_batch(
    shape: Shape,
    methods: Sequence[str],
    *,
    device: str,
    dtype: str,
    samples: int,
    tokens: int,
    cached: int,
    repeats: int,
) -> dict[str, Any]:
    """Measure `methods` (names of `METHODS`; the base model is always among them) and return one entry for each.

    An entry has `title`, `parameters` of one adapter, `error` against the samples alone, and for each kind of work `seconds` and
    `ratio` (the base model's time by the method's, per round), each with median, quartiles and all samples.
    """
    base = build_model(shape, device=device, dtype=getattr(torch, dtype), seed=_SEED).eval()
    targets = target_names(base)
    generator = torch.Generator(device=device).manual_seed(_SEED)
    prompt, long_prompt = (
        torch.randint(shape.vocabulary, (samples, length), generator=generator, device=device)
        for length in (tokens, cached)
    )
    entries: dict[str, dict[str, Any]] = {BASE: {"title": "the base model alone", "parameters": 0, "error": 0.0}}
    served = {BASE: Served(base, None)}
    for name in (name for name in METHODS if name in methods):
        served[name] = serve(METHODS[name], sharing_copy(base), targets, samples)
        own = [p for key, p in served[name].model.named_parameters() if "adapter0" in key]
        entries[name] = {"title": METHODS[name].title, "parameters": sum(p.numel() for p in own)}
        entries[name]["error"] = _error(name, served[name], prompt, _TOLERANCE[dtype])

    for work, ids in (("prompt", prompt), ("token", prompt[:, :1])):
        steps = {name: partial(model, ids) for name, model in served.items()}
        _time(work, steps, entries, repeats=repeats, device=device)
    with _all_decoding(served, long_prompt, prompt[:, :1]) as decoding:
        _time("decoding", decoding, entries, repeats=repeats, device=device)
    return entries


@contextmanager
def _all_decoding(
    served: dict[str, Served], prompt: Tensor, token: Tensor
) -> Iterator[dict[str, Callable[[], Tensor]]]:
    if not served:
        yield {}
        return
    (name, model), *others = served.items()
    with model.decoding(prompt, token) as step, _all_decoding(dict(others), prompt, token) as steps:
        yield {name: step, **steps}


def _time(
    work: str,
    steps: Mapping[str, Callable[[], Tensor]],
    entries: dict[str, dict[str, Any]],
    *,
    repeats: int,
    device: str,
) -> None:
    for step in steps.values():
        for _ in range(_WARM_UP):
            step()
    seconds = measure.interleaved_seconds(steps, rounds=repeats, device=device, seed=_SEED)
    for name, found in seconds.items():
        ratios = [limit / own for own, limit in zip(found, seconds[BASE], strict=True)]
        entries[name][work] = {"seconds": spread(found), "ratio": spread(ratios)}


def _error(name: str, served: Served, ids: Tensor, tolerance: float) -> float:
    """Check that the first and the last sample come out as alone: only then is the cost comparable."""
    together = served(ids)
    error = 0.0
    for sample in (0, len(ids) - 1):
        served.model.set_adapter(served.names[sample])
        served.model.requires_grad_(False)
        alone = served.model(input_ids=ids[sample : sample + 1]).logits[0]
        error = max(error, ((together[sample] - alone).abs().max() / alone.abs().max()).item())
    if not error <= tolerance:
        raise RuntimeError(f"{name}: a sample in the batch is off the sample alone by {error:.1e}")
    return error


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result, with its setting above and its goals below."""
    settings, methods = result["settings"], result["methods"]
    work = {
        "prompt": f"{settings['tokens']} tokens a sample",
        "token": "1 token a sample",
        "decoding": f"1 token a sample, {settings['cached']} cached",
    }
    lines = [
        f"| method | {' | '.join(work.values())} | parameters an adapter |",
        f"|---|{'--:|' * (len(work) + 1)}",
    ]
    for method in methods.values():
        cells = [
            f"{ratio['median']:.3f} ({ratio['quartiles'][0]:.3f}–{ratio['quartiles'][1]:.3f}), "
            f"{1000 * method[name]['seconds']['median']:.1f} ms"
            for name in work
            for ratio in [method[name]["ratio"]]
        ]
        lines.append(f"| {method['title']} | {' | '.join(cells)} | {method['parameters']:,} |")
    goals = [
        f"- {name}, {work[kind]}: at least {least:.2f} of the base model's throughput: {reached:.3f}, "
        f"{'reached' if reached >= least else 'MISSED'}"
        for name, kind, least in GOALS
        if name in methods
        for reached in [methods[name][kind]["ratio"]["median"]]
    ]
    setting = origin(
        result, f"{settings['samples']} samples with an adapter each; throughput as a share of the base model's"
    )
    return "\n\n".join([setting, "\n".join(lines), "\n".join(goals)]) + "\n"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_batch", description=__doc__.splitlines()[0])
    add_shape(parser, SHAPES, _TOLERANCE, default="llama")
    parser.add_argument("--samples", type=int, default=32, help="samples and adapters; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="tokens a sample in a prompt; default: %(default)s")
    parser.add_argument("--cached", type=int, default=64, help="cached tokens in decoding; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="rounds; default: %(default)s")
    add_threads(parser, 2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add_result(parser)
    arguments = parser.parse_args(argv)
    check_positive(parser, arguments, "samples", "tokens", "cached", "repeats", "threads")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.show:
        print(markdown(json.loads(arguments.show.read_text())))
        return 0
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    settings = {
        "device": arguments.device,
        "dtype": arguments.dtype or shape.dtype,
        "samples": arguments.samples,
        "tokens": arguments.tokens,
        "cached": arguments.cached,
        "repeats": arguments.repeats,
    }
    result = {
        **provenance("mixed_batch", FORMAT, arguments.device, shape),
        "settings": {"shape": arguments.shape, **settings, "warm_up": _WARM_UP, "seed": _SEED},
        "methods": measure_mixed_batch(shape, arguments.methods, **settings),
    }
    if arguments.output:
        write(result, arguments.output)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
