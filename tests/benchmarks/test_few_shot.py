"""The few-shot benchmark scores kernels and fine-tuning on one draw, goes on where it was, and its tables hold what the files do."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from transformers import BertModel, PreTrainedTokenizerFast

from benchmarks import few_shot
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path / "encoder"
    BertModel(tiny_config(len(tiny_tokenizer))).save_pretrained(folder)
    tiny_tokenizer.model_max_length = 32
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    source = random.Random(0)
    words = {0: ["bad", "awful", "sad"], 1: ["good", "great", "happy"]}
    for split, size in (("train", 80), ("validation", 8), ("test", 20)):
        rows = []
        for number in range(size):
            label = number % 2
            rest = " ".join(source.choices(["the", "a", "story", "man", "in", "home"], k=source.randint(2, 8)))
            rows.append({"sentence": f"the film was {source.choice(words[label])} {rest}", "label": label})
        path = tmp_path / "data" / "sst2" / f"{split}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path / "data"


def test_a_run_is_kept_and_not_repeated(
    data: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_shot, "_STEPS", 4)
    monkeypatch.setattr(few_shot, "_RATES", (1e-3, 1e-2))
    # RoAd's usual groups are of 64 features, and these layers have 16.
    monkeypatch.setitem(few_shot.METHODS, "RoAd1", {**few_shot.METHODS["RoAd1"], "group_size": 2})
    arguments = [
        "--data",
        str(data),
        "--tasks",
        "sst2",
        "--shots",
        "4",
        "--seeds",
        "13",
        "--rows",
        "10",
        "--max-length",
        "32",
        "--folder",
        str(tmp_path / "kept"),
    ]
    few_shot.main([*arguments, "--model", model])
    path = tmp_path / "kept" / "sst2-4-13.json"
    kept = path.read_text()
    result = json.loads(kept)
    assert result["rows"] == 10
    assert set(result["kernels"]) == set(few_shot.METHODS)
    assert result["kernels"]["all parameters"]["distances"] == {"p = 1": 0.0, "p = 2": 0.0}
    assert 0 < result["kernels"]["one row"]["distances"]["p = 1"] < 2
    tuned = result["full_fine_tuning"]
    best = max(tuned["runs"], key=lambda one: one["validation"])
    assert (tuned["score"], tuned["learning_rate"]) == (best["test"], best["learning_rate"])
    few_shot.main([*arguments, "--model", model])
    assert path.read_text() == kept


def test_tables_hold_means_and_spreads_over_the_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, score in ((13, 0.7), (21, 0.8)):
        kernels = {name: {"score": score, "distances": {"p = 1": 0.1, "p = 2": 0.2}} for name in few_shot.METHODS}
        one = {
            "task": "sst2",
            "shots": 16,
            "seed": seed,
            "start": 0.5,
            "kernels": kernels,
            "full_fine_tuning": {"score": 0.9},
        }
        (tmp_path / f"sst2-16-{seed}.json").write_text(json.dumps(one))
    few_shot.main(["--show", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| measured | SST-2 |" in shown
    assert "| full fine-tuning | 90.0 ± 0.0 |" in shown
    assert "| kernel of one row | 75.0 ± 7.1 |" in shown
    assert "| RoAd1 | 0.100 / 0.200 |" in shown
    assert "over 2 draws" in shown
    assert "published: Kowsher et al., RoCoFT, ACL 2025, table 4" in shown


def test_rows_of_the_smallest_class_are_counted_once_each(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [*((f"good {number}", 1) for number in range(5)), *((f"bad {number % 3}", 0) for number in range(9))]
    path.write_text("".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows))
    assert few_shot._enough(str(path), "sst2", 1)
    assert not few_shot._enough(str(path), "sst2", 2)
