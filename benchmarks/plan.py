"""How far the memory forecast of ``turnrow plan`` is from what training takes.

For every case the plan is made from the model's config; then, for every method, three steps of training run for real, with
the Trainer, the optimizer and the collator of a run, in two processes of their own:

- one under `LiveBytes`, which adds up the tensors that are alive: what the forecast claims to know;
- one under nothing, of which the kernel says how much memory was resident at the peak: allocator, workspaces and all. A few
  steps of a tiny model come before, so that libraries and kernels are loaded when the count starts.

Weights are memory-mapped from the checkpoint and become resident when they are first read, so each is read once before
training; what training then adds is the growth.

    python -m benchmarks.plan --output benchmarks/results/plan-cpu.json
    python -m benchmarks.plan --show benchmarks/results/plan-cpu.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertConfig, PretrainedConfig

from benchmarks import environment
from benchmarks.shapes import SHAPES, model_config

__all__ = ["CASES", "Case", "main", "markdown"]

FORMAT = 1
GOAL = 0.15
"""How far a forecast may be off, as a share of what was measured."""
_STEPS = 3
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
    "llama-bfloat16": Case("llama", 8, 256, (), "bfloat16"),
    "llama-autocast": Case("llama", 4, 256, (("bf16", True),)),
    "tiny": Case("tiny-bert", 2, 16),
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
    training = {"per_device_train_batch_size": case.batch, "max_steps": _STEPS, "use_cpu": True, "disable_tqdm": True}
    return {
        "model": str(folder),
        "task": {"name": "classification", "text": "text", "label": "label"},
        "data": {"train": "none", "test": "none"},
        "method": method,
        "training": {**training, "save_strategy": "no", **dict(case.training)},
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
        from turnrow.training.base import load_base
        from turnrow.training.methods import apply_method
        from turnrow.training.trainer import training_arguments

        self.recipe = Recipe.from_dict(fields)
        options = {"metric": None, "text": "text", "label": "label"}
        saved = {"version": 1, "name": "classification", "options": options, "learned": {"labels": [0, 1]}}
        self.task = task_from_dict(saved)
        self.args = training_arguments(self.recipe, self.task, fields["output_dir"])
        self.base = load_base(self.recipe.model, self.task, dtype=self.recipe.dtype)
        self.model = apply_method(self.base, self.recipe.method, self.task.peft_task_type)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            # Reads it, and with it the pages of the file.
            tensor.detach().view(-1).max() if tensor.numel() else None

    def train(self) -> None:
        from datasets import Dataset

        from turnrow.training.trainer import make_trainer

        length, rows = self.recipe.max_length, _STEPS * self.args.per_device_train_batch_size
        # One row of a batch is a token shorter, so that there is padding to mask, as there is in most batches.
        lengths = [length - (row % self.args.per_device_train_batch_size == 0) for row in range(rows)]
        columns = {
            "input_ids": [[1 + (row + n) % 40 for n in range(tokens)] for row, tokens in enumerate(lengths)],
            "attention_mask": [[1] * tokens for tokens in lengths],
            "labels": [row % 2 for row in range(rows)],
        }
        trainer = make_trainer(
            self.task, self.model, self.base.tokenizer, self.args, train=Dataset.from_dict(columns)
        )
        trainer.train()


def measured(fields: dict[str, Any], warm_up: dict[str, Any], kind: str) -> dict[str, int]:
    """Train and return the figures of one `kind`; runs in a process of its own."""
    from turnrow.training.live_bytes import LiveBytes
    from turnrow.training.measure import peak_memory, reset_peak_memory

    cpu = torch.device("cpu")
    Run(warm_up).train()
    gc.collect()
    if kind == "live":
        run = Run(fields)
        with LiveBytes() as live:
            run.train()
        return {"live_growth": live.peak}
    reset_peak_memory(cpu)
    before, _ = peak_memory(cpu)
    run = Run(fields)
    gc.collect()
    reset_peak_memory(cpu)
    loaded, _ = peak_memory(cpu)
    run.train()
    peak, _ = peak_memory(cpu)
    return {"resident_loaded": loaded - before, "resident_growth": peak - loaded, "resident_total": peak - before}


def measure_case(name: str, case: Case, methods: Sequence[str] | None) -> dict[str, Any]:
    """Forecast and measure one case; an entry for each method."""
    with tempfile.TemporaryDirectory() as place:
        folder, tiny = Path(place) / "base", Path(place) / "tiny"
        make_checkpoint(case, folder)
        small = Case(f"tiny-{'bert' if case.model == 'minilm' else case.model}".replace("tiny-tiny", "tiny"), 2, 16, case.training, case.dtype)
        make_checkpoint(small, tiny)
        entries = {}
        for forecast in forecasts(case, folder):
            title, method = forecast["title"], forecast["method"]
            if methods is not None and method["name"] not in methods:
                continue
            spec = {"fields": recipe_fields(case, folder, method), "warm_up": recipe_fields(small, tiny, _shrunk(method))}
            figures: dict[str, int] = {}
            for kind in ("live", "resident"):
                figures |= _in_a_process(spec, kind)
            (step,) = forecast["batches"]
            model = forecast["base_bytes"] + forecast["adapter_bytes"]
            peak = step["peak_bytes"]
            entries[title] = {
                "forecast": forecast,
                "measured": figures,
                "ratio": {
                    "live_growth": (peak - model) / figures["live_growth"],
                    "resident_growth": (peak - model) / figures["resident_growth"],
                    "resident_total": peak / figures["resident_total"],
                },
            }
            print(f"{name}, {title}: {entries[title]['ratio']}", file=sys.stderr)
        return {"case": asdict(case), "methods": entries}


def _shrunk(method: dict[str, Any]) -> dict[str, Any]:
    return {**method, "group_size": 2} if method["name"] == "road" else method


def _in_a_process(spec: dict[str, Any], kind: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.plan", "--child", kind]
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the training to measure failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result file."""
    machine, settings = result["machine"], result["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"{machine['processor']}, {settings['threads']} threads; {packages}; commit {result['commit']['commit'][:12]}"
        f"{' with changes' if result['commit']['modified'] else ''}. MiB; in brackets forecast / measured.",
        "",
        "| case | method | model | forecast growth | live tensors | resident | forecast total | resident total |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    worst = {"live_growth": 1.0, "resident_growth": 1.0, "resident_total": 1.0}
    for name, case in result["cases"].items():
        for title, entry in case["methods"].items():
            forecast, figures, ratio = entry["forecast"], entry["measured"], entry["ratio"]
            model, peak = forecast["base_bytes"] + forecast["adapter_bytes"], forecast["batches"][0]["peak_bytes"]
            cells = [
                name,
                title,
                _mib(model),
                _mib(peak - model),
                *(f"{_mib(figures[key])} ({ratio[key]:.3f})" for key in ("live_growth", "resident_growth")),
                _mib(peak),
                f"{_mib(figures['resident_total'])} ({ratio['resident_total']:.3f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            worst = {key: max(value, ratio[key], key=lambda r: abs(r - 1)) for key, value in worst.items()}
    lines.append("")
    for key, value in worst.items():
        reached = "reached" if abs(value - 1) <= GOAL else "MISSED"
        lines.append(f"- {key.replace('_', ' ')}: the worst forecast is {value:.3f} of what was measured; within {GOAL:.0%}: {reached}")
    return "\n".join(lines) + "\n"


def _mib(value: float) -> str:
    return f"{value / _MEBIBYTE:,.1f}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=_DEFAULT, help="default: all but tiny")
    parser.add_argument("--methods", nargs="+", choices=["rocoft", "road", "lora", "full"], help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch; default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file to write, else only the table is printed")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a result file; measure nothing")
    parser.add_argument("--child", choices=["live", "resident"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.child:
        spec = json.load(sys.stdin)
        print(json.dumps(measured(spec["fields"], spec["warm_up"], arguments.child)))
        return 0
    if arguments.show:
        print(markdown(json.loads(arguments.show.read_text())))
        return 0
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    result = {
        "format": FORMAT,
        "benchmark": "plan",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": environment.machine("cpu"),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "settings": {"threads": arguments.threads, "steps": _STEPS, "goal": GOAL},
        "cases": {name: measure_case(name, CASES[name], arguments.methods) for name in arguments.cases},
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        draft = arguments.output.with_suffix(".part")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(draft, arguments.output)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
