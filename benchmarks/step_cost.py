"""What one training step costs, in time and in memory, against the cheapest step there can be.

A step is forward and backward of a transformer with random weights; the optimizer is left out. The limit is the same step of
the frozen model: forward, and backward to the inputs. The step starts from ``inputs_embeds`` that require a gradient, in every
method: in a real run the gradient must pass through all layers too (an adapter in the first layer needs it, and
``enable_input_require_grads`` asks for it), so a method that stopped early in the first layer would look cheaper than it is.

Every method sees the same weights (shared storage), the same inputs and the same linear layers to adapt, and starts as the
identity: the loss and the gradient at the inputs are compared with the frozen model's before anything is timed. The steps
run interleaved, each method once per round in shuffled order; a ratio is taken within a round, and the table shows the
median over rounds with the quartiles.

    python -m benchmarks.step_cost --shape llama --repeats 20 --output benchmarks/results/llama-cpu.json
    python -m benchmarks.step_cost --show benchmarks/results/llama-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.arguments import add_result, add_shape, add_threads, check_positive
from benchmarks.methods import LIMIT, METHODS, find_method, sharing_copy
from benchmarks.results import provenance, spread, write
from benchmarks.shapes import SHAPES, Shape, build_model, target_names
from benchmarks.table import markdown

__all__ = ["main", "measure_step_cost"]

FORMAT = 1
_SEED = 0
_WARM_UP = 2

# How far a method's loss and input gradient may lie from the frozen model's at the start, relative to the largest entry.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


_Start: TypeAlias = tuple[Tensor, Tensor]
"""The first loss and the gradient at the inputs."""


class _Step:
    """Forward and backward of one model on fixed inputs."""

    def __init__(self, model: nn.Module, embeddings: Tensor, labels: Tensor) -> None:
        self.model = model
        self.embeddings = embeddings.detach().requires_grad_(True)
        self.labels = labels

    def clear(self) -> None:
        self.embeddings.grad = None
        for parameter in self.model.parameters():
            parameter.grad = None

    def forward(self) -> Tensor:
        return self.model(inputs_embeds=self.embeddings, labels=self.labels).loss

    def __call__(self) -> Tensor:
        self.clear()
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def warmed_up(self) -> _Start:
        for _ in range(_WARM_UP - 1):
            self()
        loss, gradient = self(), self.embeddings.grad
        if gradient is None:
            raise RuntimeError("no gradient has come to the inputs")
        return loss, gradient.clone()


def measure_step_cost(
    shape: Shape,
    methods: Sequence[str],
    *,
    device: str,
    dtype: str,
    batch: int,
    sequence: int,
    repeats: int,
) -> dict[str, Any]:
    """Measure `methods` (names as `methods.find_method` takes them; the limit is always among them) and return one entry for each.

    An entry has `seconds` and `ratio` (to the limit, per round), each with median, quartiles and all samples;
    `saved_bytes`, `saved_ratio`, `held_bytes`, `peak_bytes`; `trained_parameters`, `gradient_bytes`,
    `adamw_state_bytes`; `loss` and `input_gradient_error`. A method that ran out of memory has `failed` instead.
    """
    base = build_model(shape, device=device, dtype=getattr(torch, dtype), seed=_SEED)
    targets = target_names(base)
    generator = torch.Generator(device=device).manual_seed(_SEED)
    embeddings = torch.randn(batch, sequence, shape.hidden, generator=generator, device=device, dtype=base.dtype)
    if shape.family == "llama":
        labels = torch.randint(shape.vocabulary, (batch, sequence), generator=generator, device=device)
    else:
        labels = torch.randint(2, (batch,), generator=generator, device=device)

    entries: dict[str, dict[str, Any]] = {}
    steps: dict[str, _Step] = {}
    expected: _Start | None = None
    for name in [LIMIT, *(name for name in dict.fromkeys(methods) if name != LIMIT)]:
        entries[name] = {"title": find_method(name).title}
        try:
            step = _Step(find_method(name).apply(sharing_copy(base), targets), embeddings, labels)
            start = step.warmed_up()
            expected = expected or start
            entries[name] |= _same_start(name, start, expected, _TOLERANCE[dtype])
            entries[name] |= _memory(step, device)
            steps[name] = step
        except torch.OutOfMemoryError:
            if name == LIMIT:
                raise
            entries[name]["failed"] = "out of memory"

    seconds = measure.interleaved_seconds(steps, rounds=repeats, device=device, seed=_SEED)
    if expected is None or not torch.equal(steps[LIMIT](), expected[0]):
        raise RuntimeError("the shared base weights changed during the run: some method left its trace in them")
    for name, samples in seconds.items():
        ratios = [sample / limit for sample, limit in zip(samples, seconds[LIMIT], strict=True)]
        entries[name] |= {"seconds": spread(samples), "ratio": spread(ratios)}
        entries[name]["saved_ratio"] = entries[name]["saved_bytes"] / entries[LIMIT]["saved_bytes"]
    return entries


def _same_start(name: str, start: _Start, expected: _Start, tolerance: float) -> dict[str, float]:
    """Check that the method computes what the frozen model does, loss and gradient: only then is its cost comparable."""
    (loss, gradient), (expected_loss, expected_gradient) = start, expected
    error = ((gradient - expected_gradient).abs().max() / expected_gradient.abs().max()).item()
    off = abs(loss.item() / expected_loss.item() - 1)
    if not (error <= tolerance and off <= tolerance):
        raise RuntimeError(
            f"{name} starts off the frozen model: loss by {off:.1e}, gradient at the inputs by {error:.1e}"
        )
    return {"loss": loss.item(), "input_gradient_error": error}


def _memory(step: _Step, device: str) -> dict[str, int]:
    step.clear()
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    figures = {
        "saved_bytes": measure.saved_bytes(step.forward, step.model),
        "held_bytes": measure.held_bytes(step.forward, device),
        "peak_bytes": measure.peak_bytes(step, device),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "gradient_bytes": sum(p.grad.nbytes for p in step.model.parameters() if p.grad is not None),
        "adamw_state_bytes": measure.adamw_state_bytes(trained),
    }
    step.clear()
    return figures


def _method_name(name: str) -> str:
    try:
        find_method(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__.splitlines()[0])
    add_shape(parser, SHAPES, _TOLERANCE, default="llama")
    parser.add_argument("--batch", type=int, help="sequences a step; default: the shape's")
    parser.add_argument("--sequence", type=int, help="tokens a sequence; default: the shape's")
    parser.add_argument(
        "--repeats", type=int, default=20, help="rounds, each runs every method once; default: %(default)s"
    )
    add_threads(parser, 2)
    parser.add_argument(
        "--methods",
        nargs="+",
        type=_method_name,
        metavar="METHOD",
        default=list(METHODS),
        help=f"of {', '.join(METHODS)}; lora, rows and columns with any rank, as rows:64; default: all of these",
    )
    add_result(parser)
    arguments = parser.parse_args(argv)
    check_positive(parser, arguments, "batch", "sequence", "repeats", "threads")
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
        "batch": arguments.batch or shape.batch,
        "sequence": arguments.sequence or shape.sequence,
        "repeats": arguments.repeats,
    }
    result = {
        **provenance("step_cost", FORMAT, arguments.device, shape),
        "settings": {"shape": arguments.shape, **settings, "warm_up": _WARM_UP, "seed": _SEED},
        "methods": measure_step_cost(shape, arguments.methods, **settings),
    }
    if arguments.output:
        write(result, arguments.output)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
