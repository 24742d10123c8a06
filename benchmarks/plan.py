"""How far the memory forecast of ``turnrow plan`` is from what training takes.

For every case the plan is made from the model's config. Then, for every method, two steps of training run for real, with the
Trainer, the optimizer and the collator of a run, in processes of their own, and are measured in three ways:

live
    The tensors that are alive, added up by `LiveBytes`: exactly what the forecast speaks of.
resident
    What the kernel says was resident at the peak, with ``MALLOC_MMAP_THRESHOLD_=1048576`` set, so that the C library gives
    every block of a tensor back as soon as it is freed: workspaces, rounding and the interpreter are in it.
as it comes
    The same without that setting. glibc keeps freed blocks and reuses them badly, by how much depends on its version.

Libraries and kernels take memory too when they are first used; a few steps of a tiny model come before the count starts.
Weights are memory-mapped from the checkpoint and become resident when they are first read, so each is read once before
training. What the process then grows by is compared with the forecast without the model; the total with the whole forecast.

    python -m benchmarks.plan --output benchmarks/results/plan-cpu.json
    python -m benchmarks.plan --show benchmarks/results/plan-cpu.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertConfig, PretrainedConfig

from benchmarks.arguments import add_result, add_threads
from benchmarks.results import provenance, write
from benchmarks.shapes import SHAPES, model_config

__all__ = ["CASES", "Case", "main", "markdown"]

FORMAT = 1
GOAL = 0.15
"""How far a forecast may be off, as a share of what was measured."""
_STEPS = 2
"""The first has no optimizer state yet, but what layers need only once."""
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Case:
    """A model and the size of a batch."""

    model: str
    """A shape of `benchmarks.shapes`, or ``minilm``: hidden 384, 6 layers, vocabulary 30,522, with dropout."""
    batch: int
    sequence: int
    training: tuple[tuple[str, Any], ...] = ()
    """Further training arguments."""
    dtype: str = "float32"

    def config(self) -> PretrainedConfig:
        if self.model != "minilm":
            return model_config(SHAPES[self.model])
        return BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


CASES: dict[str, Case] = {
    "llama": Case("llama", 4, 256),
    "bert": Case("bert", 8, 128),
    "minilm-short": Case("minilm", 64, 32),
    "minilm-long": Case("minilm", 4, 512),
    "llama-checkpointing": Case("llama", 8, 256, (("gradient_checkpointing", True),)),
    "tiny": Case("tiny-bert", 8, 64),
}
_DEFAULT = [name for name in CASES if name != "tiny"]


def make_checkpoint(case: Case, folder: Path) -> None:
    """Write a base model with random weights and a tokenizer of a few tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModel.from_config(case.config(), dtype=getattr(torch, case.dtype)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def recipe_fields(case: Case, folder: Path, method: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that both the plan and the training follow."""
    training = {
        "per_device_train_batch_size": case.batch,
        "max_steps": _STEPS,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **dict(case.training),
    }
    return {
        "model": str(folder),
        "task": {"name": "classification", "text": "text", "label": "label"},
        "data": {"train": "none", "test": "none"},
        "method": method,
        "training": training,
        "max_length": case.sequence,
        "dtype": case.dtype,
        "output_dir": str(folder / "run"),
    }


def forecasts(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Return what ``turnrow plan`` says of every method, as JSON has it."""
    from turnrow.training import Recipe, plan

    planned = plan(Recipe.from_dict(recipe_fields(case, folder, {"name": "rocoft"})))
    return planned.to_dict()["methods"]


class Run:
    """A few steps of real training, as `turnrow.training.run` sets them up."""

    def __init__(self, fields: dict[str, Any]) -> None:
        from turnrow.tasks import task_from_dict
        from turnrow.training import Recipe
        from turnrow.training.arguments import training_arguments
        from turnrow.training.base import load_base
        from turnrow.training.methods import apply_method

        self.recipe = Recipe.from_dict(fields)
        self.length: int = fields["max_length"]
        options = {"metric": None, "text": "text", "label": "label"}
        saved = {"version": 1, "name": "classification", "options": options, "learned": {"labels": [0, 1]}}
        self.task = task_from_dict(saved)
        self.args = training_arguments(self.recipe, self.task, fields["output_dir"])
        self.base = load_base(
            self.recipe.model, self.task, dtype=self.recipe.dtype, quantization=self.recipe.quantization
        )
        self.model = apply_method(self.base, self.recipe.method, self.task.peft_task_type)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.numel() and self.recipe.quantization is None:
                tensor.detach().view(-1).max()  # reads it, and with it the pages of the file

    def train(self) -> None:
        from datasets import Dataset

        from turnrow.training.trainer import make_trainer

        length, rows = self.length, _STEPS * self.args.per_device_train_batch_size
        # One row of a batch is a token shorter, so that there is padding to mask, as there is in most batches.
        lengths = [length - (row % self.args.per_device_train_batch_size == 0) for row in range(rows)]
        columns = {
            "input_ids": [[1 + (row + n) % 40 for n in range(tokens)] for row, tokens in enumerate(lengths)],
            "attention_mask": [[1] * tokens for tokens in lengths],
            "labels": [row % 2 for row in range(rows)],
        }
        trainer = make_trainer(self.task, self.model, self.base.tokenizer, self.args, train=Dataset.from_dict(columns))
        trainer.train()


def measured(fields: dict[str, Any], warm_up: dict[str, Any], live: bool) -> dict[str, int]:
    """Train in this process, which should have done nothing else, and return what was resident.

    Args:
        fields: of the recipe to measure.
        warm_up: of a tiny one to run before.
        live: train once more and add up the living tensors too.
    """
    from turnrow.training.live_bytes import LiveBytes
    from turnrow.training.measure import peak_memory, reset_peak_memory

    cpu = torch.device("cpu")

    def resident() -> int:
        gc.collect()
        reset_peak_memory(cpu)
        return peak_memory(cpu)[0]

    Run(warm_up).train()
    before = resident()
    run = Run(fields)
    loaded = resident()
    run.train()
    peak, _ = peak_memory(cpu)
    figures = {"loaded": loaded - before, "growth": peak - loaded, "total": peak - before}
    if live:
        del run
        run = Run(fields)
        with LiveBytes() as tensors:
            run.train()
        figures["live"] = tensors.peak
    return figures


def measure_case(name: str, case: Case, methods: Sequence[str] | None) -> dict[str, Any]:
    """Forecast and measure one case; an entry for each method."""
    with tempfile.TemporaryDirectory() as place:
        folder, tiny = Path(place) / "base", Path(place) / "tiny"
        family = "llama" if case.model.endswith("llama") else "bert"
        small = Case(f"tiny-{family}", 2, 16, case.training, case.dtype)
        make_checkpoint(case, folder)
        make_checkpoint(small, tiny)
        entries = {}
        for forecast in forecasts(case, folder):
            title, method = forecast["title"], forecast["method"]
            if methods is not None and method["name"] not in methods:
                continue
            fields, warm_up = recipe_fields(case, folder, method), recipe_fields(small, tiny, method)
            resident = _in_a_process({"fields": fields, "warm_up": warm_up, "live": True}, _GIVE_BACK)
            as_it_comes = _in_a_process({"fields": fields, "warm_up": warm_up, "live": False}, {})
            peak = forecast["batches"][0]["peak_bytes"]
            growth = peak - forecast["base_bytes"] - forecast["adapter_bytes"]
            entries[title] = {
                "forecast": forecast,
                "resident": resident,
                "as_it_comes": as_it_comes,
                "ratio": {
                    "live": growth / resident["live"],
                    "resident growth": growth / resident["growth"],
                    "resident total": peak / resident["total"],
                    "growth as it comes": growth / as_it_comes["growth"],
                },
            }
            print(f"{name}, {title}: {entries[title]['ratio']}", file=sys.stderr)
        return {"case": asdict(case), "methods": entries}


def _in_a_process(spec: dict[str, Any], environment_variables: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.plan", "--child"]
    variables = {**os.environ, **environment_variables}
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(f"the training to measure failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result file."""
    machine, settings = result["machine"], result["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"{machine['processor']}, {settings['threads']} threads, {machine['system']}, {settings['libc']}; {packages}; commit "
        f"{result['commit']['commit'][:12]}{' with changes' if result['commit']['modified'] else ''}. MiB on top of the model; "
        "in brackets forecast / measured.",
        "",
        "| case | method | model | forecast | live tensors | resident | as it comes | total, forecast / resident |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    ratios: dict[str, list[float]] = {}
    for name, case in result["cases"].items():
        for title, entry in case["methods"].items():
            forecast, ratio = entry["forecast"], entry["ratio"]
            model = forecast["base_bytes"] + forecast["adapter_bytes"]
            found = {
                "live": entry["resident"]["live"],
                "resident growth": entry["resident"]["growth"],
                "growth as it comes": entry["as_it_comes"]["growth"],
            }
            cells = [
                name,
                title,
                _mib(model),
                _mib(forecast["batches"][0]["peak_bytes"] - model),
                *(f"{_mib(value)} ({ratio[key]:.3f})" for key, value in found.items()),
                f"{ratio['resident total']:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            for key, value in ratio.items():
                ratios.setdefault(key, []).append(value)
    lines.append("")
    for key, values in ratios.items():
        off = max(abs(value - 1) for value in values)
        lines.append(
            f"- {key}: forecast / measured {min(values):.3f} to {max(values):.3f}; within {GOAL:.0%}: "
            f"{'reached' if off <= GOAL else 'MISSED'}"
        )
    return "\n".join(lines) + "\n"


def _mib(value: float) -> str:
    return f"{value / _MEBIBYTE:,.1f}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=_DEFAULT, help="default: all but tiny")
    parser.add_argument("--methods", nargs="+", choices=["rocoft", "road", "lora", "full"], help="default: all")
    add_threads(parser, 2)
    add_result(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.child:
        spec = json.load(sys.stdin)
        print(json.dumps(measured(**spec)))
        return 0
    if arguments.show:
        print(markdown(json.loads(arguments.show.read_text())))
        return 0
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    result = {
        **provenance("plan", FORMAT),
        "settings": {
            "threads": arguments.threads,
            "steps": _STEPS,
            "goal": GOAL,
            "environment": _GIVE_BACK,
            "libc": " ".join(platform.libc_ver()),
        },
        "cases": {name: measure_case(name, CASES[name], arguments.methods) for name in arguments.cases},
    }
    if arguments.output:
        write(result, arguments.output)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
