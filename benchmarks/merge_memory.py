"""What merging into a sharded checkpoint takes: memory and time, file by file against the whole model in memory.

A checkpoint of random weights is written to a scratch folder, an adapter for it beside, and `turnrow merge` runs as a process of its
own: file by file with its data limited (RLIMIT_DATA, what a process allocates), in memory without a limit. Both results are compared
byte by byte.

    python -m benchmarks.merge_memory --scratch /tmp --output benchmarks/results/merge-memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, RoadConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import environment
from benchmarks.results import write
from turnrow import RocoftConfig

__all__ = ["main"]

FORMAT = 1
_SHARD_BYTES = 500 * 2**20

METHODS: dict[str, PeftConfig] = {
    "rows": RocoftConfig(r=3, init_weights=False, task_type="CAUSAL_LM"),
    "road_1": RoadConfig(variant="road_1", target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM"),
}


def _config(layers: int) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    return LlamaConfig(vocab_size=32_000, num_hidden_layers=layers, tie_word_embeddings=False, **sizes)


def _write_base(folder: Path, layers: int) -> int:
    """Write the checkpoint shard by shard, so that this process stays small; return its size in bytes."""
    config = _config(layers)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map, held, total, number = {}, 0, 0, 1
    for place, (name, shape) in enumerate(names.items()):
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        held += shard[name].nbytes
        weight_map[name] = f"model-{number:05d}.safetensors"
        if held >= _SHARD_BYTES or place == len(names) - 1:
            save_file(shard, folder / weight_map[name], metadata={"format": "pt"})
            total, held, number, shard = total + held, 0, number + 1, {}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_adapter(folder: Path, layers: int, config: PeftConfig) -> None:
    """An adapter of random values, of a model without weights."""
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(_config(layers)), config)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = torch.empty(parameter.shape).normal_(std=0.01, generator=generator)
            state[name] = value + 1 if "alpha" in name else value
    for name, buffer in model.named_buffers():
        if "rocoft" in name:
            state[name] = torch.arange(len(buffer))  # selection 'first'
    named = {name.replace(".default", ""): value for name, value in state.items()}
    model.peft_config["default"].save_pretrained(str(folder))
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _merge(base: Path, adapter: Path, out: Path, limit: int | None, *options: str) -> dict[str, Any]:
    """Run the command; seconds and the greatest resident memory of the process."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [
        sys.executable,
        "-m",
        "turnrow",
        "merge",
        "--base",
        str(base),
        "--adapter",
        str(adapter),
        "--out",
        str(out),
    ]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], preexec_fn=restrict, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_resident_bytes": usage.ru_maxrss * 1024, "limit_bytes": limit}


def _is_same(mine: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors."""

    def files(folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    ours, theirs = files(mine), files(other)
    if ours.keys() != theirs.keys():
        return False
    for name, path in ours.items():
        with safe_open(path, "pt") as file, safe_open(theirs[name], "pt") as others:
            if not torch.equal(file.get_tensor(name), others.get_tensor(name)):
                return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=46, help="of the model; default: %(default)s, 4 GB in bfloat16")
    parser.add_argument("--limit", type=float, default=1.5, help="GB of data file by file; default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument(
        "--scratch", type=Path, help="where the checkpoints go, three times their size; default: the system's"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        size = _write_base(base, arguments.layers)
        for name in arguments.methods:
            folder = Path(scratch) / name
            _write_adapter(folder / "adapter", arguments.layers, METHODS[name])
            by_file = _merge(base, folder / "adapter", folder / "by-file", int(arguments.limit * 1e9))
            whole = _merge(base, folder / "adapter", folder / "in-memory", None, "--in-memory")
            same = _is_same(folder / "by-file", folder / "in-memory")
            results[name] = {"by_file": by_file, "in_memory": whole, "equal": same}
            print(
                f"{name}: {size / 1e9:.2f} GB; file by file {by_file['peak_resident_bytes'] / 1e9:.2f} GB, {by_file['seconds']:.0f} s; "
                f"in memory {whole['peak_resident_bytes'] / 1e9:.2f} GB, {whole['seconds']:.0f} s; equal: {same}",
                flush=True,
            )
    if arguments.output:
        whole_result = {
            "format": FORMAT,
            "benchmark": "merge_memory",
            "machine": environment.machine("cpu"),
            **environment.commit(),
            "settings": {"layers": arguments.layers, "checkpoint_bytes": size, "shard_bytes": _SHARD_BYTES},
            "methods": results,
        }
        write(whole_result, arguments.output)
    return 0 if all(result["equal"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
