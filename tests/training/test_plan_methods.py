"""The forecast for every kind of RoCoFT and of base, against training or against what is known of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from benchmarks.plan import Case, Run, make_checkpoint, recipe_fields
from turnrow.errors import UserError
from turnrow.training import Recipe, plan
from turnrow.training.live_bytes import LiveBytes
from turnrow.training.planning import MethodPlan
from turnrow.training.quantization import QUANTIZATIONS

CASE = Case("tiny-bert", 8, 64)
DOUBLE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(CASE, folder)
    return folder


@pytest.fixture(autouse=True)
def _own_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnrow.training.planning.forecast.candidates", lambda method: [dict(method)])


def planned(
    folder: Path, method: dict[str, Any], case: Case = CASE, **changes: Any
) -> tuple[MethodPlan, dict[str, Any]]:
    """The plan of one method, and the recipe it is of."""
    fields = {**recipe_fields(case, folder, method), **changes}
    (forecast,) = plan(Recipe.from_dict(fields)).methods
    return forecast, fields


def growth(forecast: MethodPlan) -> int:
    """Bytes at the peak on top of the model."""
    peak = forecast.batches[0].peak_bytes
    assert peak is not None, forecast.note
    return peak - model_bytes(forecast)


def model_bytes(forecast: MethodPlan) -> int:
    assert forecast.base_bytes is not None
    assert forecast.adapter_bytes is not None
    return forecast.base_bytes + forecast.adapter_bytes


def trained(fields: dict[str, Any]) -> tuple[Any, int]:
    """The model after two steps, and the most bytes of tensors that they made."""
    run = Run(fields)
    with LiveBytes() as live:
        run.train()
    return run.model, live.peak


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "row+column", "r": 2},
        {"mode": "entry", "density": 0.1},
        {"selection": "random"},
        {"indices": [5, 0]},
        {"mode": "row+column", "indices": {"row": [5, 0], "column": [1]}},
        {"bias": "all"},
    ],
    ids=str,
)
def test_every_kind_of_rocoft_is_forecast(options: dict[str, Any], base: Path) -> None:
    forecast, fields = planned(base, {"name": "rocoft", **options})
    model, live = trained(fields)
    assert forecast.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model_bytes(forecast) == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    # Which entries lie in which block of rows is taken to be even.
    assert growth(forecast) == pytest.approx(live, rel=0.01 if options.get("mode") == "entry" else 0, abs=4096)


@pytest.mark.parametrize("selection", ["gradient", "fisher", "wanda_max"])
def test_what_is_chosen_by_data_takes_what_the_first_ones_take(selection: str, base: Path) -> None:
    first, fields = planned(base, {"name": "rocoft"})
    forecast, _ = planned(base, {"name": "rocoft", "selection": selection})
    assert forecast.batches == first.batches
    recipe = Recipe.from_dict({**fields, "method": {"name": "rocoft", "selection": selection}})
    assert any("calibration data is not in the forecast" in note for note in plan(recipe).notes)


def test_reselection_is_said_to_be_left_out(base: Path) -> None:
    _, fields = planned(base, {"name": "rocoft"})
    recipe = Recipe.from_dict({**fields, "reselection": {"every": 1, "strategy": "cycle", "budget": 6}})
    assert any("nothing is selected anew" in note for note in plan(recipe).notes)


METHODS = [{"name": "rocoft"}, {"name": "rocoft", "mode": "column"}, {"name": "road"}, {"name": "lora", "r": 8}]


@pytest.mark.parametrize("kind", [*QUANTIZATIONS, pytest.param(DOUBLE, id="nf4-double")])
@pytest.mark.parametrize("method", METHODS, ids=["row", "column", "road", "lora"])
def test_a_quantized_base_is_forecast(kind: Any, method: dict[str, Any], base: Path) -> None:
    package = "torchao" if "torchao" in kind else "bitsandbytes"
    pytest.importorskip(package, reason=f"needs {package}, by pip install 'turnrow[quantized]'")
    forecast, fields = planned(base, {**method, "target_modules": "all-linear"}, quantization=kind)
    model, live = trained(fields)
    assert model_bytes(forecast) == pytest.approx(sum(map(tensor_bytes, _tensors(model))), rel=0, abs=1024)
    # bitsandbytes to the last tensor; torchao makes some more while it unpacks.
    assert growth(forecast) == pytest.approx(live, rel=0.08 if package == "torchao" else 0, abs=4096)


def _tensors(model: torch.nn.Module) -> list[Any]:
    """Parameters, buffers, and what bitsandbytes keeps beside its weights."""
    found: list[Any] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [state.absmax, state.code, *([] if state.offset is None else [state.offset])]
            state = state.state2
    for module in model.modules():
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is not None:
            found.append(scales)
    return found


def tensor_bytes(tensor: Any) -> int:
    if type(tensor).__module__.startswith("torchao."):
        names, _ = tensor.__tensor_flatten__()
        return sum(getattr(tensor, name).nbytes for name in names)
    return int(tensor.nbytes)


def test_full_fine_tuning_is_planned_for_the_base_as_it_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, _ = planned(base, {"name": "full"})
    monkeypatch.setattr("turnrow.training.planning.forecast.candidates", lambda method: [method, {"name": "full"}])
    fields = {**recipe_fields(CASE, base, {"name": "rocoft"}), "quantization": "nf4"}
    rows, beside = plan(Recipe.from_dict(fields)).methods
    assert beside == full
    assert rows.base_bytes < 0.9 * full.base_bytes  # the embeddings are not quantized


def test_a_quantization_whose_bytes_are_not_known_is_refused(base: Path) -> None:
    with pytest.raises(
        UserError, match="plan knows how much memory nf4, int8, .* take, no others: leave quantization out"
    ):
        planned(base, {"name": "rocoft"}, quantization={"quant_method": "hqq", "nbits": 4})


def test_of_experts_everything_but_the_step_is_known(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=60, num_local_experts=4).save_pretrained(tmp_path)
    forecast, _ = planned(tmp_path, {"name": "rocoft", "r": 2, "target_modules": "all-linear"})
    # Four experts of 2 * 48 x 32 and 32 x 48, four projections of 32 x 32, the head of 2 labels; the router is a parameter.
    assert forecast.trainable_parameters == 4 * 2 * (32 + 48) + 4 * 2 * 32 + 2 * 32
    assert forecast.batches[0].peak_bytes is None
    assert forecast.note is not None
    assert "how many tokens each expert gets depends on the values" in forecast.note


class _Mixture(Case):
    """A mixture of experts."""

    def config(self) -> MixtralConfig:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        return MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=60, num_local_experts=4, pad_token_id=0)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ({"name": "road", "group_size": 2, "target_modules": ["q_proj"]}, "float32"),
        ({"name": "road", "group_size": 2, "target_modules": ["q_proj"]}, "bfloat16"),
        ({"name": "lora", "r": 2, "target_modules": "all-linear"}, "float32"),  # peft takes the experts for linear
        ({"name": "lora", "r": 2, "target_modules": "all-linear"}, "bfloat16"),
        ({"name": "full"}, "float32"),
    ],
    ids=["road", "road-bfloat16", "lora", "lora-bfloat16", "full"],
)
@pytest.mark.filterwarnings(
    "ignore:the experts of this model are not trained", "ignore:.*_pattern keys did not match:RuntimeWarning"
)
def test_other_methods_on_experts_are_forecast(method: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    case = _Mixture("mixtral", 4, 32, dtype=dtype)
    make_checkpoint(case, tmp_path)
    forecast, fields = planned(tmp_path, method, case)
    _, live = trained(fields)
    assert growth(forecast) == pytest.approx(live, rel=0, abs=4096)


def test_rows_of_experts_that_no_kernel_takes_are_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 52}
    MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=60, num_local_experts=4).save_pretrained(tmp_path)
    forecast, _ = planned(tmp_path, {"name": "lora", "r": 2, "target_modules": ["q_proj"]}, dtype="bfloat16")
    assert forecast.batches[0].peak_bytes is None
    assert forecast.note is not None
    assert "a row of 104 bytes in the experts, where their kernel (grouped_mm) needs a multiple of 16" in forecast.note


def test_a_warning_of_the_method_is_in_its_note(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=60, num_local_experts=4).save_pretrained(tmp_path)
    forecast, _ = planned(tmp_path, {"name": "road", "group_size": 2})
    assert forecast.note is not None
    assert "the experts of this model are not trained" in forecast.note


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="lama' cannot be loaded: there is no such folder"):
        planned(tmp_path / "lama", {"name": "rocoft"})


def test_a_base_that_is_saved_quantized_is_refused(tmp_path: Path) -> None:
    LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="is saved quantized.* give the model it was made from, and quantization in the recipe"
    ):
        planned(tmp_path, {"name": "rocoft"})
