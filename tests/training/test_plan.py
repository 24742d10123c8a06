"""A plan says what a run takes: held against real training, byte for byte where nothing but tensors is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BartConfig, BertConfig, BertForMaskedLM, BertModel, LlamaConfig, TrainingArguments

from benchmarks.measure import held_bytes, saved_bytes
from benchmarks.plan import Case, Run, make_checkpoint, recipe_fields
from turnrow.errors import UserError
from turnrow.tasks import ClassificationTask
from turnrow.training import Plan, Recipe, plan
from turnrow.training.base import load_base
from turnrow.training.live_bytes import LiveBytes
from turnrow.training.methods import method_title
from turnrow.training.planning.candidates import candidates
from turnrow.training.planning.largest import LARGEST, largest_batch
from turnrow.training.planning.optimizer import optimizer_bytes
from turnrow.training.skeleton import load_skeleton

CPU = torch.device("cpu")
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}

CASES = {
    "bert": Case("tiny-bert", 8, 64),
    "bert, checkpointing": Case("tiny-bert", 8, 64, ((CHECKPOINTING, True),)),
    "llama, bfloat16 weights": Case("tiny-llama", 8, 64, (), "bfloat16"),
    "llama, autocast, accumulation": Case("tiny-llama", 8, 64, (("bf16", True), ("gradient_accumulation_steps", 2))),
}


@pytest.fixture(scope="module", params=CASES)
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, Plan]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("base")
    make_checkpoint(case, folder)
    return case, folder, plan(Recipe(**recipe_fields(case, folder, {"name": "rocoft"})))


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    sizes = {**SIZES, "num_hidden_layers": 1}
    LlamaConfig(**sizes, num_key_value_heads=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def recipe(model: Path | str, **changes: Any) -> Recipe:
    fields = {
        "model": str(model),
        "task": {"name": "classification", "text": "text"},
        "data": {"train": "no/such.jsonl", "test": "no/such.jsonl"},
        "method": {"name": "rocoft", "r": 2},
        "training": {"use_cpu": True},
        "max_length": 8,
        "output_dir": "no/such/run",
    }
    return Recipe(**{**fields, **changes})


def own_method(model: Path | str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Plan:
    """The plan of the recipe's method alone."""
    monkeypatch.setattr("turnrow.training.planning.forecast.candidates", lambda method: [dict(method)])
    return plan(recipe(model, **changes))


def test_the_forecast_is_what_training_takes(planned: tuple[Case, Path, Plan]) -> None:
    case, folder, forecast = planned
    assert [method.title for method in forecast.methods] == [
        "rocoft row r=3",
        "rocoft column r=3",
        "road road_1",
        "lora r=8",
        "full",
    ]
    for method in forecast.methods:
        if method.title == "full" and case.dtype != "float32":
            continue
        run = Run(recipe_fields(case, folder, method.method))
        with LiveBytes() as live:
            run.train()
        peak, model_bytes = method.batches[0].peak_bytes, method.base_bytes + method.adapter_bytes
        # A few numbers that Trainer computes of the loss.
        assert abs(peak - model_bytes - live.peak) <= 4096, method.title
        parameters = list(run.model.parameters())
        assert model_bytes == sum(t.nbytes for t in [*parameters, *run.model.buffers()]), method.title
        assert method.trainable_parameters == sum(p.numel() for p in parameters if p.requires_grad), method.title
        assert method.gradient_bytes == 4 * method.trainable_parameters


@pytest.mark.parametrize("method", [{"name": "rocoft"}, {"name": "rocoft", "mode": "column"}, {"name": "head"}])
def test_saved_bytes_are_those_that_a_forward_leaves_behind(
    method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["bert"]
    make_checkpoint(case, tmp_path)
    fields = recipe_fields(case, tmp_path, method)
    planned = own_method(tmp_path, monkeypatch, **{name: fields[name] for name in ("method", "training", "max_length")})
    forecast = planned.methods[0].batches[0].saved_bytes
    model = Run(fields).model.train()
    mask = torch.ones(case.batch, case.sequence, dtype=torch.long)
    mask[0, -1] = 0
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}

    def forward() -> torch.Tensor:
        return model(**inputs, labels=torch.zeros(case.batch, dtype=torch.long)).loss

    forward()  # the original rows are set aside once
    assert abs(forecast - held_bytes(forward)) <= 128
    assert abs(forecast - saved_bytes(forward, model)) <= 4096


def test_checkpointing_saves_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BertConfig(**SIZES).save_pretrained(tmp_path)
    without, with_it = (
        own_method(tmp_path, monkeypatch, training={"use_cpu": True, CHECKPOINTING: value}) for value in (False, True)
    )
    assert with_it.checkpointing
    assert not without.checkpointing
    assert with_it.methods[0].batches[0].saved_bytes < 0.5 * without.methods[0].batches[0].saved_bytes


@pytest.mark.parametrize("architecture", [BertModel, BertForMaskedLM])
def test_a_skeleton_is_the_base_without_its_weights(
    architecture: type, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture(BertConfig(**SIZES)).save_pretrained(tmp_path / "whole")
    tiny_tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    task = ClassificationTask(text="text")
    task.labels = ["a", "b", "c"]
    base = load_base(str(tmp_path / "whole"), task, dtype="bfloat16")
    for folder in ("whole", "bare"):
        skeleton = load_skeleton(str(tmp_path / folder), task.auto_model, task.model_kwargs(), dtype="bfloat16")
        assert skeleton.new_modules == base.new_modules
        described = [
            [(n, p.shape, p.dtype) for n, p in model.named_parameters()] for model in (skeleton.model, base.model)
        ]
        assert described[0] == described[1]
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_decoder_is_planned_from_its_config_alone(config_only: Path) -> None:
    planned = plan(recipe(config_only, max_length=None), batches=[1, 2])
    assert planned.sequence == 2048
    assert planned.labels == 2
    assert "no/such.jsonl" in planned.notes[0]
    assert "2,048 tokens a row" in planned.notes[1]
    rows, columns, *_, full = planned.methods
    head = 2 * 32
    assert rows.trainable_parameters == 2 * (6 * 32 + 48) + head
    assert columns.trainable_parameters == 2 * (5 * 32 + 2 * 48) + head
    model = load_skeleton(str(config_only), "AutoModelForSequenceClassification", {"num_labels": 2}).model
    assert full.trainable_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert full.adapter_bytes == 0
    for method in planned.methods:
        small, large = method.batches
        assert (small.batch, large.batch) == (1, 2)
        assert small.saved_bytes < large.saved_bytes < large.peak_bytes
    assert json.loads(json.dumps(planned.to_dict()))["methods"][0]["title"] == "rocoft row r=2"
    assert not Path("no").exists()


def test_labels_are_read_from_a_local_training_split(tmp_path: Path, config_only: Path, monkeypatch: Any) -> None:
    rows = "".join(json.dumps({"text": "a", "label": label}) + "\n" for label in ("x", "y", "z"))
    (tmp_path / "train.jsonl").write_text(rows)
    data = {"train": str(tmp_path / "train.jsonl"), "test": "none"}
    assert own_method(config_only, monkeypatch, data=data).labels == 3
    assert own_method(config_only, monkeypatch, task={"name": "regression", "text": "text"}).labels == 1


def test_the_largest_batch_fits_and_one_more_does_not(config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnrow.training.planning.forecast.candidates", lambda method: [dict(method)])
    memory = 2 * 2**20
    fits = plan(recipe(config_only), memory=memory).methods[0].largest_batch
    assert fits is not None
    within, beyond = plan(recipe(config_only), batches=[fits, fits + 1]).methods[0].batches
    assert within.peak_bytes <= memory < beyond.peak_bytes
    assert plan(recipe(config_only), memory=1000).methods[0].largest_batch == 0


@settings(max_examples=50)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**4)), min_size=1, max_size=3),
    memory=st.integers(1, 10**7),
)
def test_the_search_finds_the_largest(pieces: list[tuple[int, int]], memory: int) -> None:
    asked: list[int] = []

    def peak(batch: int) -> int:
        asked.append(batch)
        return max(constant + slope * batch for constant, slope in pieces)

    found = largest_batch(peak, memory)
    assert len(asked) == len(set(asked)) <= 40
    if found == 0:
        assert peak(1) > memory
    else:
        assert peak(found) <= memory
        assert found == LARGEST or peak(found + 1) > memory


def test_a_model_that_looks_at_values_gets_all_but_the_forecast_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {
        f"{side}_{name}": 1 if name == "layers" else 2
        for side in ("encoder", "decoder")
        for name in ("layers", "attention_heads")
    }
    BartConfig(vocab_size=60, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **sides).save_pretrained(tmp_path)
    (method,) = own_method(tmp_path, monkeypatch).methods
    assert method.trainable_parameters > 0
    assert method.base_bytes > 0
    assert method.batches[0].saved_bytes is None
    assert method.batches[0].peak_bytes is None
    assert "no forecast of the step, which without values stops at" in method.note


def test_an_unknown_optimizer_is_said_and_left_out(config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (method,) = own_method(config_only, monkeypatch, training={"use_cpu": True, "optim": "lomo"}).methods
    assert method.optimizer_bytes is None
    assert "state of this optimizer is not known" in method.note


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_optimizer_state_is_what_the_optimizer_keeps(optim: str, tmp_path: Path) -> None:
    from transformers import Trainer

    args = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, report_to="none")
    parameters = [nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(5))]
    forecast = optimizer_bytes(args, parameters, CPU)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert forecast is not None
    assert forecast.state == sum(value.nbytes for value in kept)
    assert all(parameter.is_cpu for parameter in parameters)


def test_eight_bit_states_take_a_byte_a_value_and_a_scale_a_block(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), optim="adamw_bnb_8bit", use_cpu=True, report_to="none")
    # Measured of bitsandbytes 0.50, without its two tables of 1 KiB: 5 parameters, three of them large enough.
    sizes = [(512, 512), (300,), (3, 1000), (4096,), (4097,)]
    assert optimizer_bytes(args, [nn.Parameter(torch.empty(size)) for size in sizes], CPU) == (577578 - 2048, 0)


def test_no_method_is_compared_twice_and_all_adapt_the_same_modules() -> None:
    assert [method_title(method) for method in candidates({"name": "rocoft", "mode": "column", "r": 5})] == [
        "rocoft column r=5",
        "rocoft row r=5",
        "road road_1",
        "lora r=8",
        "full",
    ]
    assert method_title(candidates({"name": "full"})[0]) == "full"
    assert len(candidates({"name": "full"})) == 5
    chosen = candidates({"name": "lora", "r": 8, "target_modules": ["query"]})
    assert len(chosen) == 5
    assert all(method["target_modules"] == ["query"] for method in chosen if method["name"] != "full")


def test_a_sibling_that_does_not_fit_is_no_obstacle(config_only: Path) -> None:
    planned = plan(recipe(config_only, method={"name": "lora", "target_modules": ["embed_tokens"]}))
    assert planned.methods[0].note is None
    rows = next(method for method in planned.methods if method.title == "rocoft row r=3")
    assert "RoCoFT trains linear layers" in rows.note
    assert rows.batches == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": [4, 0]}, "batch is 0; expected a whole number, 1 or more"),
        ({"batches": [-3]}, "batch is -3"),
        ({"batches": [True]}, "batch is True"),
        ({"sequence": 0}, "sequence is 0"),
        ({"sequence": 4096}, "sequence is 4096; expected 1 to 2048 tokens a row"),
        ({"memory": 0}, "memory is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(config_only: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(recipe(config_only), **arguments)


def test_a_model_that_is_not_to_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model 'some/model' cannot be loaded: .*connect"):
        plan(recipe("some/model"))
    with pytest.raises(UserError, match="model '.*empty' cannot be loaded"):
        (tmp_path / "empty").mkdir()
        plan(recipe(tmp_path / "empty"))


def test_a_method_that_does_not_fit_the_model_is_refused(config_only: Path) -> None:
    with pytest.raises(UserError, match="r is 500, but module"):
        plan(recipe(config_only, method={"name": "rocoft", "r": 500}))


def test_a_method_that_needs_the_weights_is_refused(config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any) -> None:
        torch.empty(1, device="meta").item()

    monkeypatch.setattr("turnrow.training.planning.forecast.apply_method", read)
    with pytest.raises(UserError, match="method rocoft cannot be planned, because it starts from the values"):
        plan(recipe(config_only))


def test_a_task_whose_inputs_are_not_known_is_refused(config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassificationTask, "auto_model", "AutoModelForImageClassification")
    with pytest.raises(UserError, match="plan knows the inputs of models of text, not those of the task"):
        plan(recipe(config_only))


def test_a_language_model_is_planned_with_a_label_for_each_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    saved = []
    for vocabulary in (100, 1100):
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes).save_pretrained(tmp_path)
        planned = own_method(tmp_path, monkeypatch, task={"name": "language_modelling"})
        assert planned.labels is None
        (method,) = planned.methods
        saved.append({step.batch: step.saved_bytes for step in method.batches})
    small, large = saved
    for batch in small:
        held, more = small[batch], large[batch]
        assert held is not None
        assert more is not None
        # The logits of every token are kept for the backward pass, in float32, at least once.
        assert more - held >= 4 * 1000 * 8 * batch
