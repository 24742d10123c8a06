"""How far fine-tuning moves hidden states: their lengths and their directions. RoAd's pilot study, left and middle panels.

MiniLM is fine-tuned on SST-2 (the suite's settings, 1,000 rows, first seed) by each method; then its hidden states on the validation split are compared
with those of the pretrained model, layer by layer. The learning rates are those that the suite found best for the method; that of full
fine-tuning, which the suite had not searched, is 1e-4.

    python -m benchmarks.displacement --data DIR
    python -m benchmarks.displacement --show

DIR holds ``sst2`` with ``train.jsonl.gz`` and ``validation.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.arguments import add_data, add_kept_result, add_threads, kept_result, need_data
from benchmarks.results import provenance, write
from benchmarks.suite.measure import data_of
from turnrow.analysis.displacement import displacement
from turnrow.tasks import read_table

__all__ = ["METHODS", "main", "markdown", "measure"]

FORMAT = 1
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"name": "full"}, 1e-4),
    "LoRA r=8": ({"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, 3e-3),
    "RoAd1": ({"name": "road", "variant": "road_1", "target_modules": "all-linear"}, 1e-2),
    "rows r=3": ({"name": "rocoft", "mode": "row", "r": 3}, 3e-3),
}
"""By name, the method of the recipe and its learning rate."""
_SETTINGS = Path(__file__).parent / "experiments" / "settings" / "minilm.yaml"
_RESULT = Path(__file__).parent / "results" / "displacement-sst2-minilm.json"
_KINDS = ("first", "content")


def measure(
    method: Mapping[str, Any], rate: float, data: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train once, then compare hidden states.

    Args:
        method: of the recipe.
        rate: learning rate.
        data: files of the splits "train" and "validation".
        settings: the recipe without method, data and task.
    """
    from transformers import AutoModel

    from turnrow.pretrained import resolve_model, without_load_report
    from turnrow.training import Recipe, train
    from turnrow.training.saved import load_saved

    training = {**settings["training"], "learning_rate": rate, "disable_tqdm": True}
    with TemporaryDirectory() as scratch:
        recipe = Recipe.from_dict(
            {
                **settings,
                "task": {"name": "classification", "text": ["sentence"], "label": "label"},
                "method": dict(method),
                "data": {"train": data["train"], "test": data["validation"]},
                "training": training,
                "seed": 0,
                "output_dir": f"{scratch}/run",
            }
        )
        run = train(recipe)
        saved = load_saved(run.adapter)
        with without_load_report():
            base = AutoModel.from_pretrained(resolve_model(recipe.model)) if method["name"] == "full" else None
        texts = [row["sentence"] for row in read_table(data["validation"])]
        tokenizer = saved.tokenizer
        found = displacement(saved.model, _batches(texts, tokenizer), base, special_ids=tokenizer.all_special_ids)
    return {
        "method": dict(method),
        "learning_rate": rate,
        "validation_accuracy": run.metrics["after"]["accuracy"],
        "displacement": found.to_dict(),
    }


def _batches(texts: Sequence[str], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), 64):
        yield dict(
            tokenizer(ordered[start : start + 64], padding=True, truncation=True, max_length=128, return_tensors="pt")
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every method, each kept as soon as it is done."""
    settings = yaml.safe_load(_SETTINGS.read_text())
    result: dict[str, Any] = {
        **provenance("displacement", FORMAT),
        "task": "sst2",
        "training_rows": arguments.rows,
        "settings": settings["recipe"],
        "methods": {},
    }
    with data_of(arguments.data, "sst2", arguments.rows) as data:
        for name in arguments.methods:
            result["methods"][name] = measure(*METHODS[name], data, settings["recipe"])
            write(result, arguments.output)
            print(f"{name}: accuracy {result['methods'][name]['validation_accuracy']:.3f}", file=sys.stderr)
    return result


def markdown(result: dict[str, Any]) -> str:
    """Means of dM and dD in the last two layers, of [CLS] and of words."""
    lines = [
        "| | accuracy | "
        + " | ".join(f"{layer}, {kind}: dM | dD" for layer in _shown(result) for kind in ("[CLS]", "words"))
        + " |",
        "|---|--:|" + "--:|" * 4 * len(_shown(result)),
    ]
    for name, found in result["methods"].items():
        cells = [f"{100 * found['validation_accuracy']:.1f}"]
        for layer in _shown(result):
            for kind in _KINDS:
                moved = found["displacement"]["layers"][layer][kind]
                cells += [f"{moved['magnitude']['mean']:.3f}", f"{1 - moved['turn']['mean']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(result: dict[str, Any]) -> list[str]:
    """The last layer but one, which the paper shows, and the last."""
    return list(next(iter(result["methods"].values()))["displacement"]["layers"])[-2:]


def draw(result: dict[str, Any], target: Path) -> None:
    """Means over the layers, a line a method."""
    from turnrow.analysis.pictures import COLORS, finish, finished, new_figure

    figure = new_figure(9.5, 5.6)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (kind, title) in enumerate(zip(_KINDS, ("[CLS]", "words"), strict=True)):
        for row, (measure, what) in enumerate((("magnitude", "| ‖x‖ − ‖x0‖ | / ‖x0‖"), ("turn", "1 − cos(x, x0)"))):
            axes = panels[row, column]
            for color, (name, found) in zip(COLORS, result["methods"].items(), strict=False):
                layers = found["displacement"]["layers"]
                means = [own[kind][measure]["mean"] for own in layers.values()]
                axes.plot(range(len(means)), means, color=color, marker="o", markersize=3.5, linewidth=1.6, label=name)
            finish(axes, f"{title}: {what}")
            if row:
                axes.set_xlabel("layer (0: embeddings)", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    finished(figure, target, None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.displacement", description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--rows", type=int, default=1_000, help="of the training split; default: %(default)s")
    add_threads(parser, 1)
    add_kept_result(parser, _RESULT)
    arguments = parser.parse_args(argv)
    if arguments.show:
        result = kept_result(parser, arguments.output)
    else:
        need_data(parser, arguments.data, ["sst2"])
        torch.set_num_threads(arguments.threads)
        result = run(arguments)
    print(markdown(result))
    if arguments.plot is not None:
        draw(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
