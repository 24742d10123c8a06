"""A probe's kernel of a method is that of what the method really trains, at its start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForSequenceClassification

from turnrow.analysis.ntk import tangent_kernels
from turnrow.errors import UserError
from turnrow.tasks import make_task, read_table
from turnrow.training.base import Base, load_base
from turnrow.training.methods import check_method
from turnrow.training.probing.data import Source, draw
from turnrow.training.probing.kernels import attached, candidate
from turnrow.training.probing.outputs import function_of

ALL = {"target_modules": "all-linear"}
METHODS = {
    "full": {"name": "full"},
    "rows": {"name": "rocoft", "mode": "row", "r": 2},
    "rows, gradient": {
        "name": "rocoft",
        "mode": "row",
        "r": 2,
        "selection": "gradient",
        "target_modules": ["query", "dense"],
    },
    "columns, wanda_max": {"name": "rocoft", "mode": "column", "r": 2, "selection": "wanda_max"},
    "rows and columns": {"name": "rocoft", "mode": "row+column", "r": 2, "selection": "random"},
    "entries": {"name": "rocoft", "mode": "entry", "density": 0.1, "selection": "random"},
    "rows and biases": {"name": "rocoft", "mode": "row", "r": 1, "bias": "rocoft_only"},
    "road_1": {"name": "road", "variant": "road_1", "group_size": 4, **ALL},
    "road_2": {"name": "road", "variant": "road_2", "group_size": 2, "target_modules": ["query"]},
    "lora": {"name": "lora", "r": 3, "lora_alpha": 5, **ALL},
    "rslora": {"name": "lora", "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["value"]},
    "lora_fa": {"name": "lora_fa", "r": 2, "lora_alpha": 2, **ALL},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "ln_tuning": {"name": "ln_tuning", "target_modules": ["LayerNorm"]},
}


@pytest.fixture
def source(make_recipe) -> Source:
    recipe = make_recipe()
    task = make_task(**recipe.task)
    train = read_table(recipe.data.train, "train")
    task.fit(train)
    return Source(train, None, task, load_base(recipe.model, task), None)


def by_autograd(source: Source, method: dict[str, Any], few: Any, start: Any) -> np.ndarray:
    """(n, n, C, C): products of the gradients of the adapted model's outputs, one sample at a time."""
    torch.manual_seed(0)
    model: Any = attached(source.base, method, "SEQ_CLS").eval()
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = whole.base_model
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    rows = []
    for batch in few.batches:
        outputs = start(inner, batch)
        for sample in range(len(outputs)):
            gradients = []
            for output in range(outputs.shape[1]):
                own = torch.autograd.grad(outputs[sample, output], trained, retain_graph=True, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, own, strict=True)]
                gradients.append(torch.cat([g.flatten().double() for g in flat]))
            rows.append(torch.stack(gradients))
    every = torch.stack(rows)
    return torch.einsum("icp,jdp->ijcd", every, every).numpy()


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_kernel_of_what_the_method_trains(source, name):
    method = check_method(METHODS[name])
    few, _ = draw(source, 3, 4, 0, 4)
    function = function_of(source.task, source.base)
    start = function.fit(few)
    torch.manual_seed(0)
    one = candidate(source.base, method, "SEQ_CLS", few.labelled, function.strip)
    kernel = tangent_kernels(function.model, few.batches, {"": one.description}, start)[""]
    if "selection" in method and method["selection"] in ("gradient", "wanda_max"):
        # What was chosen is part of the method; the adapted model is told.
        method = check_method(
            {
                **{key: value for key, value in method.items() if key != "selection"},
                "indices": indices_of(one, function),
            }
        )
    expected = by_autograd(source, method, few, start)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(kernel.train, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def indices_of(one: Any, function: Any) -> dict[str, list[int]]:
    chosen = getattr(one.description, "rows", None) or one.description.columns
    return {function.strip + module: list(indices) for module, indices in chosen.items()}


def test_the_base_stays_as_it_was(source):
    before = {name: value.clone() for name, value in source.base.model.state_dict().items()}
    few, _ = draw(source, 3, 4, 0, 4)
    candidate(source.base, check_method(METHODS["rows, gradient"]), "SEQ_CLS", few.labelled, "bert.")
    after = source.base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "vera"}, "method vera: its kernel is not known; a probe knows full, rocoft"),
        ({"name": "lora", "use_dora": True, **ALL}, "a probe knows no kernel of one with use_dora"),
        ({"name": "road", "blocks": ":50%", "group_size": 2, **ALL}, "a probe knows no kernel of one with blocks"),
    ],
)
def test_a_method_without_a_known_kernel_is_refused(source, method, message):
    with pytest.raises(UserError, match=message):
        candidate(source.base, check_method(method), "SEQ_CLS", [], "bert.")


def test_rows_of_fused_experts_are_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, intermediate_size=8, vocab_size=10, num_local_experts=2, num_experts_per_tok=1)
    base = Base(MixtralForSequenceClassification(config), None, ("score",))
    method = {"name": "rocoft", "mode": "row", "r": 1}
    with pytest.raises(
        UserError, match=r"no kernel of the fused experts of this model, .* say target_parameters: \[\]"
    ):
        candidate(base, check_method(method), "SEQ_CLS", [], "model.")
    rest = candidate(base, check_method({**method, "target_parameters": []}), "SEQ_CLS", [], "model.").description
    assert rest.modules == [f"layers.0.self_attn.{name}_proj" for name in "qkvo"]
