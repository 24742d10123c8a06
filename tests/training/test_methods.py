from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from turnrow.errors import UserError
from turnrow.tasks import make_task, read_table
from turnrow.training.base import Base, load_base
from turnrow.training.methods import apply_method, check_method, method_names


@pytest.fixture
def base(tiny_base: Path, films: Path, request: pytest.FixtureRequest) -> Base:
    task = make_task("classification", text="sentence", label="label")
    task.fit(read_table(str(films / "train.jsonl")))
    return load_base(str(tiny_base), task, dtype=getattr(request, "param", "float32"))


def trained(base: Base, method: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    model = apply_method(base, check_method(method), "SEQ_CLS")
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_our_methods_come_first_and_those_of_peft_follow() -> None:
    names = method_names()
    assert names[:6] == ["rocoft", "road", "full", "head", "bitfit", "lora_fa"]
    assert {"lora", "ia3", "vera", "prefix_tuning"} < set(names[6:])


def test_head_trains_the_new_head_alone(base: Base) -> None:
    assert {name.split(".modules_to_save")[0] for name in trained(base, {"name": "head"})} == {
        "base_model.model.classifier"
    }


def test_full_trains_everything(base: Base) -> None:
    assert len(trained(base, {"name": "full"})) == len(list(base.model.parameters()))


def test_bitfit_trains_every_bias_and_the_head(base: Base) -> None:
    names = set(trained(base, {"name": "bitfit"}))
    assert {"classifier" in name or name.endswith(".bias") for name in names} == {True}
    held = sum(name.endswith(".bias") and "classifier" not in name for name, _ in base.model.named_parameters())
    assert len([name for name in names if "classifier" not in name]) == held > 0


def test_bitfit_is_refused_where_only_the_head_has_biases(base: Base) -> None:
    for module in base.model.bert.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    with pytest.raises(
        UserError, match="^method bitfit: this BertForSequenceClassification has no biases outside its head"
    ):
        trained(base, {"name": "bitfit"})


def test_lora_fa_trains_b_alone(base: Base) -> None:
    names = trained(base, {"name": "lora_fa", "r": 2, "target_modules": "all-linear"})
    assert {name.split(".")[-3] for name in names if "lora_" in name} == {"lora_B"}


@pytest.mark.parametrize("base", ["bfloat16"], indirect=True)
@pytest.mark.parametrize(
    "method",
    [
        {"name": "rocoft", "r": 2},
        {"name": "road", "group_size": 8},
        {"name": "lora", "r": 2, "target_modules": "all-linear"},
        {"name": "head"},
    ],
    ids=lambda method: method["name"],
)
def test_trained_parameters_are_float32_over_a_half_precision_base(base: Base, method: dict[str, Any]) -> None:
    parameters = trained(base, method)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert any("classifier" in name for name in parameters)


def test_modules_that_the_base_did_not_hold_are_trained_with_any_method(base: Base) -> None:
    incomplete = Base(base.model, base.tokenizer, ("bert.pooler", "classifier"))
    names = trained(incomplete, {"name": "lora", "r": 2, "target_modules": ["query"]})
    assert any("pooler.modules_to_save" in name for name in names)
    assert any("classifier.modules_to_save" in name for name in names)


def test_targets_that_do_not_exist_are_an_error_of_the_user(base: Base) -> None:
    with pytest.raises(UserError, match="method lora: No modules were targeted"):
        trained(base, {"name": "lora", "target_modules": ["nowhere"]})


def test_an_expression_that_cannot_be_read_is_an_error_of_the_user(base: Base) -> None:
    with pytest.raises(UserError, match="method lora: unterminated character set"):
        trained(base, {"name": "lora", "target_modules": "["})


def test_modules_to_save_that_do_not_exist_are_refused(base: Base) -> None:
    with pytest.raises(
        UserError, match="method lora: modules_to_save names 'poler', .* BertFor.*; did you mean 'pooler'"
    ):
        trained(base, {"name": "lora", "target_modules": ["query"], "modules_to_save": ["poler"]})
    names = trained(base, {"name": "lora", "target_modules": ["query"], "modules_to_save": ["bert.pooler"]})
    assert any("pooler.modules_to_save" in name for name in names)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"r": 1}, "method has no name"),
        ({"name": "lorra"}, "there is no method 'lorra'; did you mean 'lora'"),
        ({"name": "lora", "ranks": 1}, "method lora has no field 'ranks'"),
        ({"name": "lora", "r": "x"}, "method lora.r is 'x'; expected int$"),
        ({"name": "lora", "r": 4, "layers_pattern": "x"}, "method lora: .*layers_to_transform"),
        ({"name": "full", "r": 1}, "method full has no field 'r'"),
        ({"name": "bitfit", "r": 1}, "method bitfit has no field 'r'"),
        ({"name": "lora_fa", "rr": 1}, "method lora_fa has no field 'rr'"),
        ({"name": "lora", "peft_type": "LORA"}, "peft_type cannot be set here"),
    ],
)
def test_bad_methods_are_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_method(method)
