"""Every kernel against whole jacobians by torch.func in float64: encoders and decoders, padded batches, several classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import LiveBytes
from tests.analysis.ntk.models import (
    ALL,
    Case,
    all_jacobians,
    batch,
    case,
    jacobians,
    kernel_of,
    linear_layers,
    weight_jacobian,
)
from turnrow.analysis.ntk import (
    DESCRIPTIONS,
    IA3,
    BitFit,
    ClassifierHead,
    Columns,
    Description,
    Entries,
    Everything,
    Full,
    LayerNorm,
    LoRA,
    Road,
    Rows,
    RowsAndColumns,
    TangentKernels,
    tangent_kernels,
)
from turnrow.analysis.ntk.passing import FactorPass
from turnrow.errors import UserError

BY_WEIGHT = ("bert", "roberta", "encoder", "llama", "gpt2", "albert")
CONTRACTIONS = ("instantiate", "tokens")


def compute(made: Case, kernels: dict[str, Description], **how) -> TangentKernels:
    return tangent_kernels(made.model, made.train, kernels, made.outputs, made.other, **how)


def assert_equal(kernel, parts: list[Tensor], train: int = 5) -> None:
    expected = kernel_of(parts, train)
    size = np.abs(expected[0]).max()
    assert size > 0
    np.testing.assert_allclose(kernel.train, expected[0], rtol=1e-8, atol=1e-8 * size)
    np.testing.assert_allclose(kernel.other, expected[1], rtol=1e-8, atol=1e-8 * size)
    assert kernel.parameters == sum(part[0, 0].numel() for part in parts)


def mask_of(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2


@pytest.mark.parametrize("how", CONTRACTIONS)
@pytest.mark.parametrize("name", BY_WEIGHT)
def test_parts_of_weights_equal_those_of_the_jacobian(name: str, how: str) -> None:
    layers = list(linear_layers(name))
    whole = {layer: weight_jacobian(name, layer) for layer in layers}
    masks = {layer: mask_of(tuple(whole[layer].shape[2:]), n) for n, layer in enumerate(layers)}
    rows, columns = [0, 7, 3], [5, 2]
    both = {layer: torch.zeros(whole[layer].shape[2:], dtype=torch.bool) for layer in layers}
    for mask in both.values():
        mask[rows] = True
        mask[:, columns] = True
    kernels = compute(
        case(name),
        {
            "full": Full(),
            "rows": Rows(rows=2),
            "chosen rows": Rows(rows=rows),
            "columns": Columns(columns=3),
            "chosen columns": Columns(columns=dict.fromkeys(layers, columns)),
            "both": RowsAndColumns(rows=rows, columns=columns),
            "entries": Entries(masks=masks),
        },
        contraction=how,
    )
    assert_equal(kernels["full"], list(whole.values()))
    assert_equal(kernels["rows"], [j[:, :, :2] for j in whole.values()])
    assert_equal(kernels["chosen rows"], [j[:, :, rows] for j in whole.values()])
    assert_equal(kernels["columns"], [j[..., :3] for j in whole.values()])
    assert_equal(kernels["chosen columns"], [j[..., columns] for j in whole.values()])
    assert_equal(kernels["both"], [j[:, :, both[layer]] for layer, j in whole.items()])
    assert_equal(kernels["entries"], [j[:, :, masks[layer]] for layer, j in whole.items()])


@pytest.mark.parametrize("how", CONTRACTIONS)
@pytest.mark.parametrize("name", ALL)
def test_everything_equals_the_whole_jacobian(name: str, how: str) -> None:
    # Tied weights, layers called several times, positions that all samples share, experts: whatever there is.
    kernels = compute(case(name), {"everything": Everything()}, contraction=how)
    assert_equal(kernels["everything"], list(all_jacobians(name).values()))


def refused(*args) -> None:
    raise AssertionError("asked sample by sample")


@pytest.mark.parametrize("name", ["bert", "roberta", "encoder", "llama", "gpt2", "albert"])
def test_nothing_is_asked_sample_by_sample_where_factors_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FactorPass, "_sample_by_sample", refused)
    compute(case(name), {"everything": Everything()})


@pytest.mark.parametrize("how", CONTRACTIONS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_tied_weights_have_a_cross_term(name: str, how: str) -> None:
    made = case(name)
    table = next(n for n, p in made.model.named_parameters() if p is made.model.get_input_embeddings().weight)
    kernels = compute(made, {"table": Everything(parameters=[table])}, contraction=how)
    assert_equal(kernels["table"], [all_jacobians(name)[table]])


@pytest.mark.parametrize("how", CONTRACTIONS)
def test_the_padding_of_an_embedding_is_never_trained(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FactorPass, "_sample_by_sample", refused)
    made = case("roberta")
    padded = [
        {"input_ids": torch.tensor([[4, 0, 5], [6, 7, 0]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    ]
    name = "roberta.embeddings.word_embeddings.weight"
    kernel = tangent_kernels(
        made.model, padded, {"table": Everything(parameters=[name])}, made.outputs, contraction=how
    )["table"]
    assert_equal(kernel, [jacobians(made.model, padded, made.outputs, [name])[name]], train=2)


@pytest.mark.parametrize("name", ["bert", "roberta", "encoder", "llama", "gpt2", "albert", "t5"])
def test_norms_and_biases_equal_those_of_the_jacobian(name: str) -> None:
    made, j = case(name), all_jacobians(name)
    inside = {id(p) for p in made.model.base_model.parameters()}
    named = {n: p for n, p in made.model.named_parameters() if id(p) in inside}
    norms = [n for n in named if "norm" in n.lower() or ".ln_" in n]
    biases = [n for n in named if n.endswith(".bias")]
    kernels: dict[str, Description] = {"norms": LayerNorm()} | ({"biases": BitFit()} if biases else {})
    found = compute(made, kernels)
    assert_equal(found["norms"], [j[n] for n in norms])
    if biases:
        assert_equal(found["biases"], [j[n] for n in biases])


def adapted(made: Case, config) -> tuple[nn.Module, list[dict], list[dict]]:
    """The model with an adapter of peft or turnrow, at its start, in float64."""
    import copy

    from peft import get_peft_model

    import turnrow  # noqa: F401 - puts its RoAd behind peft's name

    return get_peft_model(copy.deepcopy(made.model), config).double().eval()


def adapter_jacobian(model: nn.Module, made: Case, wanted: str) -> list[Tensor]:
    names = [n for n, _ in model.named_parameters() if wanted in n]
    assert names
    return list(jacobians(model, [*made.train, *made.other], made.outputs, names).values())


def peft_config(kind: Callable, name: str, **fields):
    is_conv = {"fan_in_fan_out": True} if name == "gpt2" and kind.__name__ != "RoadConfig" else {}
    return kind(**fields, **is_conv)


@pytest.mark.parametrize("how", CONTRACTIONS)
@pytest.mark.parametrize("name", ["roberta", "llama", "gpt2"])
def test_lora_equals_the_jacobian_through_peft(name: str, how: str) -> None:
    from peft import LoraConfig

    made, layers = case(name), list(linear_layers(name))
    model = adapted(made, peft_config(LoraConfig, name, r=2, lora_alpha=6, target_modules=layers))
    a = {layer: model.get_submodule(f"base_model.model.{layer}.lora_A.default").weight.detach() for layer in layers}
    b = adapter_jacobian(model, made, "lora_B")
    assert_equal(compute(made, {"lora": LoRA(r=2, a=a, scaling=3.0)}, contraction=how)["lora"], b)
    # A has no gradient where B is zero.
    assert all(not j.any() for j in adapter_jacobian(model, made, "lora_A"))


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("name", ["roberta", "llama", "gpt2"])
def test_road_equals_the_jacobian_through_the_adapter(name: str, variant: str) -> None:
    from turnrow import RoadConfig

    made, layers = case(name), list(linear_layers(name))
    model = adapted(made, RoadConfig(variant=variant, group_size=4, target_modules=layers))
    theta, alpha = adapter_jacobian(model, made, "road_theta"), adapter_jacobian(model, made, "road_alpha")
    assert_equal(compute(made, {"road": Road(variant=variant, group_size=4)})["road"], theta + alpha)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_ia3_equals_the_jacobian_through_peft_with_its_default_layers(name: str) -> None:
    from peft import IA3Config

    made = case(name)
    model = adapted(made, peft_config(IA3Config, name))
    assert_equal(compute(made, {"ia3": IA3()})["ia3"], adapter_jacobian(model, made, "ia3_l"))


def test_road_4_starts_with_the_kernel_of_road_2() -> None:
    kernels = compute(
        case("llama"), {"2": Road(variant="road_2", group_size=2), "4": Road(variant="road_4", group_size=2)}
    )
    np.testing.assert_allclose(kernels["2"].train, kernels["4"].train)
    assert kernels["4"].parameters == 2 * kernels["2"].parameters


def test_parameters_beside_add_their_kernel() -> None:
    made, j = case("roberta"), all_jacobians("roberta")
    kernels = compute(made, {"rows": Rows(also=["classifier"])})
    head = [j[n] for n in j if n.startswith("classifier")]
    rows = [weight_jacobian("roberta", layer)[:, :, :1] for layer in linear_layers("roberta")]
    assert_equal(kernels["rows"], rows + head)


def test_modules_choose_layers_by_name_pattern_and_function() -> None:
    made = case("llama")
    wanted = [layer for layer in linear_layers("llama") if layer.endswith(("q_proj", "up_proj"))]
    kernels = compute(
        made,
        {
            "names": Full(modules=["q_proj", "up_proj"]),
            "pattern": Full(modules=r".*\.(q|up)_proj"),
            "function": Full(modules=lambda name, module: name.endswith(("q_proj", "up_proj"))),
        },
    )
    for kernel in kernels.values():
        assert_equal(kernel, [weight_jacobian("llama", layer) for layer in wanted])


def test_outputs_are_those_of_the_model() -> None:
    made = case("bert")
    kernels = compute(made, {"rows": Rows()})
    with torch.no_grad():
        expected = torch.cat([made.outputs(made.model, b) for b in made.train]).numpy()
        others = torch.cat([made.outputs(made.model, b) for b in made.other]).numpy()
    np.testing.assert_allclose(kernels.train_outputs, expected, rtol=1e-12)
    np.testing.assert_allclose(kernels.other_outputs, others, rtol=1e-12)


# --- properties ----------------------------------------------------------------------------------------------------------

EVERY = {
    "full": Full(),
    "everything": Everything(),
    "rows": Rows(rows=3),
    "columns": Columns(columns=2),
    "both": RowsAndColumns(rows=2, columns=2),
    "entries": Entries(density=0.1),
    "lora": LoRA(r=2),
    "road_1": Road(group_size=4),
    "road_2": Road(variant="road_2", group_size=4),
    "road_4": Road(variant="road_4", group_size=4),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "norm": LayerNorm(),
}


def test_every_description_is_registered_and_tried() -> None:
    assert {type(description) for description in EVERY.values()} == set(DESCRIPTIONS.values())


def test_kernels_are_symmetric_and_have_no_negative_eigenvalues() -> None:
    for kernel in compute(case("roberta"), EVERY).values():
        flat = kernel.flat
        np.testing.assert_array_equal(flat, flat.T)
        values = np.linalg.eigvalsh(flat)
        assert values[0] > -1e-9 * values[-1]


def test_how_samples_are_batched_does_not_matter() -> None:
    made = case("gpt2")
    single = [{k: v[i : i + 1] for k, v in b.items()} for b in made.train for i in range(len(b["input_ids"]))]
    together = compute(made, EVERY)
    apart = tangent_kernels(made.model, single, EVERY, made.outputs, made.other)
    for name, kernel in together.items():
        np.testing.assert_allclose(kernel.train, apart[name].train, rtol=1e-8, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(kernel.other, apart[name].other, rtol=1e-8, atol=1e-12, err_msg=name)


def test_the_model_is_left_as_it_was() -> None:
    made = case("roberta")
    made.model.train()
    try:
        made.model.classifier.dense.weight.requires_grad_(False)
        before = {n: p.requires_grad for n, p in made.model.named_parameters()}
        compute(made, {"rows": Rows(), "everything": Everything()})
        assert {n: p.requires_grad for n, p in made.model.named_parameters()} == before
        assert all(module.training for module in made.model.modules())
        assert all(p.grad is None for p in made.model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())
    finally:
        made.model.eval()
        made.model.requires_grad_(True)


def test_float32_is_near_float64() -> None:
    import copy

    made = case("bert")
    low = tangent_kernels(copy.deepcopy(made.model).float(), made.train, EVERY, made.outputs, made.other)
    for name, kernel in compute(made, EVERY).items():
        assert low[name].train.dtype == np.float64
        size = np.abs(kernel.train).max()
        np.testing.assert_allclose(low[name].train, kernel.train, atol=1e-4 * size, err_msg=name)


# --- memory --------------------------------------------------------------------------------------------------------------


def many(samples: int) -> list[dict]:
    return [batch([9, 8, 7, 9], seed) for seed in range(samples // 4)]


@pytest.mark.parametrize("how", CONTRACTIONS)
def test_small_blocks_give_the_same_kernels(how: str) -> None:
    made = case("roberta")
    large = tangent_kernels(made.model, many(16), EVERY, made.outputs, many(8), contraction=how)
    small = tangent_kernels(made.model, many(16), EVERY, made.outputs, many(8), contraction=how, block_bytes=60_000)
    for name, kernel in large.items():
        np.testing.assert_allclose(kernel.train, small[name].train, rtol=1e-9, atol=1e-13, err_msg=name)
        np.testing.assert_allclose(kernel.other, small[name].other, rtol=1e-9, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("how", CONTRACTIONS)
def test_memory_beyond_one_batch_is_at_most_the_block(how: str) -> None:
    made = case("roberta")
    block = 2**20

    def peak(samples: int, block_bytes: int) -> int:
        with LiveBytes() as live:
            tangent_kernels(
                made.model, many(samples), {"full": Full()}, made.outputs, contraction=how, block_bytes=block_bytes
            )
        return live.peak

    one_batch = peak(4, block)
    assert peak(48, block) <= one_batch + block
    # Without a limit it would be more: the limit is what holds it.
    assert peak(48, 2**30) > one_batch + block


def test_a_block_too_small_for_one_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"block_bytes leaves .* give at least \d+, or smaller batches"):
        compute(case("llama"), {"full": Full()}, block_bytes=1000, contraction="instantiate")


def test_progress_is_told_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    compute(case("llama"), {"norm": LayerNorm()}, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


def test_the_bar_goes_to_stderr(capsys: pytest.CaptureFixture) -> None:
    compute(case("llama"), {"norm": LayerNorm()}, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tangent kernels" in captured.err


# --- what a user may get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (Rows(modules=["querry"]), r"names 'querry', which fits none .* did you mean 'query'"),
        (Rows(modules="query"), r"is 'query', which fits none"),
        (Rows(modules="("), r"no regular expression"),
        (Rows(rows=17), r"module '\S+' has 16 rows: give 1 to 16"),
        (Rows(rows=[3, 16]), r"are \[3, 16\]; give numbers from 0 to 15"),
        (Columns(columns=[1, 1]), r"give each number once"),
        (Columns(columns={"roberta.encoder.layer.0.output.dense": [99]}), r"numbers from 0 to 23"),
        (Rows(modules=["key"], rows={"x": [1]}), r"rows has nothing for module '\S+key'"),
        (Entries(density=0), r"density is 0; it is a share"),
        (Entries(masks={"classifier.dense": torch.ones(2, 2, dtype=torch.bool)}), r"must be torch.bool of shape \(16, 16\)"),
        (LoRA(r=0), r"r is 0; it must be at least 1"),
        (LoRA(a={"classifier.dense": torch.ones(2, 3)}), r"must be \(r, 16\)"),
        (Road(group_size=3), r"even number"),
        (Road(group_size=64), r"does not divide the 16 output features"),
        (Rows(also=["key"]), r"also names '\S+key.weight', which Rows trains itself"),
        (Everything(parameters=["classifer"]), r"did you mean"),
        (Everything(parameters=[]), r"fits none"),
    ],
)  # fmt: skip
def test_descriptions_that_do_not_fit_are_refused(description: Description, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute(case("roberta"), {"kernel": description})


def test_a_layer_that_mixes_samples_is_refused_for_an_adapter() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x.flip(0)).flip(0)) + x @ self.one.weight[:2].T  # other order; and used outside

    model, inputs = Mixing().double(), [{"x": torch.randn(4, 3, dtype=torch.float64)}]
    outputs = lambda model, b: model(**b)  # noqa: E731
    with pytest.raises(UserError, match="'one' do not give its gradient sample by sample"):
        tangent_kernels(model, inputs, {"rows": Rows()}, outputs)
    # Trained whole it is asked sample by sample.
    kernel = tangent_kernels(model, inputs, {"all": Everything()}, outputs)["all"]
    parameters = list(model.parameters())
    rows = []
    for i in range(4):
        f = model(inputs[0]["x"][i : i + 1])
        for c in range(2):
            grads = torch.autograd.grad(f[0, c], parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    j = torch.stack(rows)
    np.testing.assert_allclose(kernel.flat, (j @ j.T).numpy(), rtol=1e-8)


def test_a_model_that_overwrites_what_a_layer_returned_gives_exact_kernels() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(x)
            y = self.one(h)
            y += 2 * h
            return self.two(y)

    torch.manual_seed(1)
    model, inputs = Overwriting().double(), [{"x": torch.randn(4, 3, dtype=torch.float64)}]
    kernels = tangent_kernels(model, inputs, {"full": Full(), "ia3": IA3(modules=["one"])}, lambda m, b: m(**b))
    h = torch.tanh(inputs[0]["x"])
    y = (model.one(h) + 2 * h).detach()
    weights = model.two.weight.detach()
    expected = torch.einsum("ci,di,nj,mj->nmcd", weights, weights, h, h)
    expected = expected + torch.einsum("ni,mi,cd->nmcd", y, y, torch.eye(2, dtype=torch.float64))
    np.testing.assert_allclose(kernels["full"].train, expected.numpy(), rtol=1e-9)
    scale = model.one(h).detach()
    expected = torch.einsum("ci,di,ni,mi->nmcd", weights, weights, scale, scale)
    np.testing.assert_allclose(kernels["ia3"].train, expected.numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda model, b: model(**b).logits[:, 0], r"returned of shape \(3,\) for a batch of 3"),
        (lambda model, b: model(**b).logits.detach(), r"depends on none of the layers"),
        (lambda model, b: model(**b), r"returned a SequenceClassifierOutput"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs: Callable, message: str) -> None:
    made = case("roberta")
    with pytest.raises(UserError, match=message):
        tangent_kernels(made.model, made.train, {"rows": Rows()}, outputs)


def test_nothing_to_compute_is_refused() -> None:
    made = case("roberta")
    with pytest.raises(UserError, match="no kernels"):
        tangent_kernels(made.model, made.train, {}, ClassifierHead())
    with pytest.raises(UserError, match="no training batches"):
        tangent_kernels(made.model, [], {"rows": Rows()}, ClassifierHead())
    with pytest.raises(UserError, match="contraction is 'gram'; it must be one of auto, instantiate, tokens"):
        tangent_kernels(made.model, made.train, {"rows": Rows()}, ClassifierHead(), contraction="gram")  # type: ignore[arg-type]
