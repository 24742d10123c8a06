"""Learning rates by module: which parameters a pattern reaches, what a step does with them, and runs with them from the first step to a resumed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from turnrow.errors import UserError
from turnrow.training import Recipe, train
from turnrow.training.rate_factors import rate_factor, scale_rates

from .conftest import MakeRecipe
from .test_resume import CrashError, crash

QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query.rocoft_row.default"
HEAD = "base_model.model.classifier.modules_to_save.default.weight"


@pytest.mark.parametrize(
    ("name", "factors", "expected"),
    [
        (HEAD, {"classifier": 0.5}, 0.5),
        (HEAD, {"class": 0.5}, 1.0),  # a pattern matches whole parts
        (HEAD, {"class.*": 0.5}, 0.5),
        (QUERY, {"classifier": 0.5}, 1.0),
        (QUERY, {"layer.1": 0.5}, 0.5),
        (QUERY, {"layer.0": 0.5}, 1.0),
        (QUERY, {"layer.[01]": 0.5, "query|key": 4}, 2.0),  # all that match
        (QUERY, {"query|key": 4, "layer.[01]": 0.5}, 2.0),
        ("bert.encoder.layer.1._fsdp_wrapped_module.attention.self.query.weight", {r"layer.1.attention": 3}, 3.0),
    ],
)
def test_a_pattern_is_for_whole_parts_of_a_name(name: str, factors: dict[str, float], expected: float) -> None:
    assert rate_factor(name, factors) == expected


def test_a_step_goes_as_far_as_the_factors_say() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    plain = [parameter.detach().clone() for parameter in model.parameters()]
    weights, biases = ([p for n, p in model.named_parameters() if kind in n] for kind in ("weight", "bias"))
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=0.5
    )
    scale_rates(optimizer, model, {"0": 0.25, "2": 4.0, "bias": 0.5})
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [
        (0.5, 0.1, 1),
        (0.5, 0.0, 0),  # all biases have a factor
        (0.125, 0.1, 1),
        (2.0, 0.1, 1),
        (0.0625, 0.0, 1),
        (0.25, 0.0, 1),
        (1.0, 0.0, 1),
    ]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [before - after.detach() for before, after in zip(plain, model.parameters(), strict=True)]
    rates = [0.125, 0.0625, 0.5, 0.25, 2.0, 1.0]
    decays = [0.1, 0.0] * 3
    for before, way, rate, decay in zip(plain, moved, rates, decays, strict=True):
        torch.testing.assert_close(way, rate * (1 + decay * before))


def test_an_optimizer_without_groups_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(UserError, match="SGD does not hold all parameters in groups; take another training.optim"):
        scale_rates(optimizer, model, {"weight": 2.0})


def test_a_run_moves_each_module_at_its_rate(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def moves(folder: str, **changes: Any) -> dict[str, float]:
        recipe = make_recipe(output_dir=str(tmp_path / folder), training={"max_steps": 1, "warmup_steps": 0}, **changes)
        tensors = load_file(train(recipe).adapter / "adapter_model.safetensors")
        return {name: tensor.abs().max().item() for name, tensor in tensors.items() if name.endswith("rocoft_row")}

    plain = moves("plain")
    scaled = moves("scaled", learning_rate_factors={"layer.0": 0.5, "query": 0.25})
    assert any("query" in name for name in plain)
    for name, moved in plain.items():  # the first step of AdamW is as long as the rate, for all that has a gradient
        factor = (0.5 if "layer.0" in name else 1) * (0.25 if "query" in name else 1)
        assert scaled[name] == pytest.approx(factor * moved, rel=1e-3), name


def test_the_logged_rate_is_that_of_the_recipe(make_recipe: MakeRecipe) -> None:
    training = {"lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
    result = train(make_recipe(training=training, learning_rate_factors={".*": 0.1}))
    history = [json.loads(line) for line in (result.folder.root / "history.jsonl").read_text().splitlines()]
    assert {entry["learning_rate"] for entry in history if "learning_rate" in entry} == {1e-2}


def test_resumed_it_ends_with_the_same_bytes(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "training": {"save_steps": 3, "warmup_steps": 2, "eval_strategy": "no"},
        "learning_rate_factors": {"classifier": 0.1, "layer.0": 2},
        "reselection": {"every": 2, "strategy": "cycle"},
    }
    whole = train(make_recipe(**changes, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        crash(patch, 6)
        with pytest.raises(CrashError):
            train(make_recipe(**changes))
    resumed = train(make_recipe(**changes), resume=True)
    assert resumed.metrics["resumed_from_step"] == 3
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_pattern_that_reaches_nothing_is_refused_before_anything_is_written(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(learning_rate_factors={"clasifier": 0.1})
    with pytest.raises(
        UserError,
        match="'clasifier' is in the name of nothing that is trained; the names have the parts base_model, .*; did you mean 'classifier'",
    ):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], r"learning_rate_factors is \[\]; expected a mapping"),
        ({}, r"learning_rate_factors is \{\}; expected a mapping"),
        ({0: 2}, "learning_rate_factors holds 0; expected a part of a module's name"),
        ({"": 2}, "learning_rate_factors holds ''; expected a part of a module's name"),
        ({"layer.(": 2}, r"learning_rate_factors: 'layer.\(' is no regular expression"),
        ({"query": 0}, "learning_rate_factors.query is 0; expected a number above 0"),
        ({"query": -1}, "learning_rate_factors.query is -1; expected a number above 0"),
        ({"query": True}, "learning_rate_factors.query is True; expected a number above 0"),
        ({"query": "two"}, "learning_rate_factors.query is 'two'; expected a number above 0"),
        ({"query": None}, "learning_rate_factors.query is None; expected a number above 0"),
        ({"query": float("inf")}, "learning_rate_factors.query is inf; expected a number above 0"),
        ({"query": float("nan")}, "learning_rate_factors.query is nan; expected a number above 0"),
    ],
)
def test_what_is_no_factor_is_refused(make_recipe: MakeRecipe, section: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(learning_rate_factors=section)


def test_factors_come_from_a_file_and_the_command_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    make_recipe(learning_rate_factors={"classifier": 0.1}).to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").learning_rate_factors == {"classifier": 0.1}
    words = ["--learning_rate_factors", "{query: 5e-1, 'layer.[01]': 2}"]
    assert Recipe.from_yaml(tmp_path / "recipe.yaml", words).learning_rate_factors == {"query": 0.5, "layer.[01]": 2.0}
    words = ["--learning_rate_factors.query=5e-1"]
    assert Recipe.from_yaml(tmp_path / "recipe.yaml", words).learning_rate_factors == {"classifier": 0.1, "query": 0.5}
