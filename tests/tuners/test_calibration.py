"""`turnrow.select`: what a RoCoFT adapter trains, chosen by what the base does with data."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import turnrow
from benchmarks.measure import LiveBytes
from tests.selection.test_gathering import autograd_sums, linears, norms_of_rows_alone, padded
from tests.tuners.models import build, identical, output, perturb, snapshot
from turnrow import RocoftConfig
from turnrow.errors import UserError
from turnrow.selection import STRATEGIES, choose_by_score, gather, needs_data
from turnrow.tuners._dense import dense_linear, dense_weight
from turnrow.tuners._walk import find_experts

BY_DATA = [s for s in STRATEGIES if needs_data(s)]
MODES = ["row", "column", "row+column", "entry"]


def linear_names(model: nn.Module) -> list[str]:
    return [name for name in linears(model) if not name.startswith("classifier")]


def config(mode: str = "row", **fields) -> RocoftConfig:
    return RocoftConfig(mode=mode, **({"density": 0.03} if mode == "entry" else {}), **fields)


def adapt(architecture: str = "llama", mode: str = "row", dtype: torch.dtype = torch.float64, **fields) -> PeftModel:
    model, _ = build(architecture, dtype=dtype)
    return get_peft_model(model, config(mode, target_modules=linear_names(model), **fields))


def reference_scores(architecture: str, strategy: str) -> dict[str, torch.Tensor]:
    """A score for every entry of every weight, (out, in)."""
    model, _ = build(architecture, dtype=torch.float64)
    if not strategy.startswith("wanda"):
        return autograd_sums(model, padded(architecture), 2 if strategy == "fisher" else 1)
    weights = {name: dense_weight(dense_linear(model.get_submodule(name))) for name in linear_names(model)}
    norms = norms_of_rows_alone(model, padded(architecture))
    return {name: weight.detach().abs() * norms[name] for name, weight in weights.items()}


@pytest.mark.parametrize("strategy", BY_DATA)
@pytest.mark.parametrize("architecture", ["llama", "roberta", "gpt2"])
def test_the_choice_is_that_of_slow_scores(architecture, strategy):
    scores = reference_scores(architecture, strategy)
    for mode in MODES:
        selection = turnrow.select(adapt(architecture, mode, selection=strategy), padded(architecture))
        assert (selection.mode, selection.strategy) == (mode, strategy)
        assert {chosen.module for chosen in selection} <= scores.keys()
        for chosen in selection:
            whole = scores[chosen.module]
            part = {"row": whole.sum(1), "column": whole.sum(0), "entry": whole.flatten()}[chosen.part]
            assert chosen.shape == tuple(whole.shape)
            assert chosen.index.tolist() == choose_by_score(strategy, part, len(chosen.index)).tolist()
            assert chosen.share == pytest.approx(float(part[chosen.index].sum() / part.sum()))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_chosen_is_what_is_trained_and_saved(mode, tmp_path):
    _, inputs = build("llama", dtype=torch.float64)
    model = adapt("llama", mode, selection="gradient")
    base = output(build("llama", dtype=torch.float64)[0], inputs)
    selection = turnrow.select(model, padded("llama"))
    assert torch.equal(output(model, inputs), base)
    perturb(model)
    changed = {
        name: (dense_weight(dense_linear(merged)) - dense_weight(dense_linear(plain))).detach() != 0
        for (name, plain), (_, merged) in zip(
            build("llama", dtype=torch.float64)[0].named_modules(),
            adapt_and_merge(model, tmp_path).named_modules(),
            strict=True,
        )
        if name in {chosen.module for chosen in selection}
    }
    for name, mask in changed.items():
        expected = torch.zeros_like(mask)
        for chosen in selection:
            if chosen.module == name:
                if chosen.part == "row":
                    expected[chosen.index] = True
                elif chosen.part == "column":
                    expected[:, chosen.index] = True
                else:
                    expected.view(-1)[chosen.index] = True
        assert torch.equal(mask, expected)


def adapt_and_merge(model: PeftModel, folder) -> nn.Module:
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(build("llama", dtype=torch.float64)[0], folder, is_trainable=True)
    loaded.train()
    loaded(**build("llama")[1])  # a loaded adapter knows its indices: training is not refused
    return loaded.merge_and_unload()


def test_the_choice_is_the_same_every_time_and_can_be_given_as_indices():
    first = turnrow.select(adapt(selection="fisher"), padded("llama"))
    again = turnrow.select(adapt(selection="fisher"), padded("llama"))
    assert first.indices() == again.indices()
    given = turnrow.select(adapt(indices=first.indices()))
    assert (given.strategy, given.indices()) == ("indices", first.indices())


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_indices_is_read(mode, tmp_path):
    selection = turnrow.select(adapt(mode=mode, selection="wanda_max"), padded("llama"))
    (tmp_path / "indices.json").write_text(json.dumps(selection.to_dict()))
    model = adapt(mode=mode, indices=str(tmp_path / "indices.json"))
    assert turnrow.select(model).indices() == selection.indices()


def state(model: nn.Module) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    flags = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    disabled = [m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters")]
    return [m.training for m in model.modules()], hooks, flags, disabled, model.active_adapters


@pytest.mark.parametrize("strategy", ["wanda_mixed", "gradient"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_all_but_the_indices_is_left_as_it_was(strategy, error):
    model = adapt("roberta", selection=strategy, modules_to_save=["classifier"])
    model.train()
    model.base_model.model.roberta.encoder.layer[1].eval()
    before, weights = state(model), snapshot(model)
    indices = turnrow.select(adapt("roberta")).indices()

    def batches():
        yield padded("roberta")[0]
        if error:
            raise error

    if error:
        with pytest.raises(error):
            turnrow.select(model, batches())
        with pytest.raises(UserError, match="selects what it trains by data, and has seen none"):
            model(**padded("roberta")[0])
        held = {n: layer.rocoft_row_index["default"].tolist() for n, layer in layers(model).items()}
        assert held == indices
    else:
        turnrow.select(model, batches())
    assert state(model) == before
    assert identical(snapshot(model), weights)


def layers(model: PeftModel) -> dict[str, nn.Module]:
    return {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "rocoft_row_index")}


def test_another_adapter_is_off_meanwhile_and_as_it_was_afterwards():
    expected = turnrow.select(adapt(selection="gradient"), padded("llama"))
    model = adapt()
    _, inputs = build("llama", dtype=torch.float64)
    model.add_adapter("second", config(selection="gradient", target_modules=linear_names(build("llama")[0])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rocoft_row.default"):
                parameter.normal_(std=0.05)
    adapted = output(model, inputs)  # goes live: the weights hold the first adapter
    assert turnrow.select(model, padded("llama"), "second").indices() == expected.indices()
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model, inputs), adapted)


def test_beside_lora_in_a_mixed_model_the_choice_is_the_same():
    expected = turnrow.select(adapt(selection="fisher"), padded("llama"))
    model, _ = build("llama", dtype=torch.float64)
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    rocoft = config(selection="fisher", target_modules=linear_names(model))
    mixed = get_peft_model(model, rocoft, mixed=True)
    mixed.add_adapter("lora", lora)
    mixed.set_adapter(["default", "lora"])
    assert turnrow.select(mixed, padded("llama")).indices() == expected.indices()


def test_training_is_refused_until_the_choice_is_made():
    model = adapt(selection="gradient")
    _, inputs = build("llama", dtype=torch.float64)
    output(model, inputs)  # evaluating is not: the difference is zero whatever it belongs to
    with pytest.raises(
        UserError, match="adapter 'default' selects what it trains by data, and has seen none: call turnrow"
    ):
        model(**inputs)
    turnrow.select(model, padded("llama"))
    model(**inputs).loss.backward()
    assert all(layer.rocoft_row["default"].grad.any() for layer in layers(model).values())


def test_indices_that_are_given_stay_and_the_rest_is_chosen():
    whole = turnrow.select(adapt(selection="gradient"), padded("llama"))
    model = adapt(selection="gradient", indices={"q_proj": [7, 1]})
    selection = turnrow.select(model, padded("llama"))
    for chosen, by_data in zip(selection, whole, strict=True):
        if chosen.module.endswith("q_proj"):
            assert (chosen.index.tolist(), chosen.share) == ([7, 1], None)
        else:
            assert (chosen.index.tolist(), chosen.share) == (by_data.index.tolist(), by_data.share)


def test_each_module_has_its_own_rank():
    model = adapt(selection="wanda_max", rank_pattern={"down_proj": 5})
    for chosen in turnrow.select(model, padded("llama")):
        assert len(chosen.index) == (5 if chosen.module.endswith("down_proj") else 3)


@pytest.mark.parametrize("strategy", ["first", "last", "uniform", "random"])
def test_strategies_without_data_are_chosen_when_the_layer_is_made(strategy):
    model = adapt(selection=strategy)
    model.train()
    model(**build("llama")[1])
    selection = turnrow.select(model)
    assert selection.strategy == strategy
    assert all(chosen.share is None for chosen in selection)
    by_module = {chosen.module: tuple(chosen.index.tolist()) for chosen in selection}
    same_size = [by_module[f"model.layers.{i}.self_attn.{p}_proj"] for i in (0, 1) for p in "qo"]
    assert len(set(same_size)) == (4 if strategy == "random" else 1)


def test_the_seed_decides_what_is_random():
    drawn = [turnrow.select(adapt(selection="random", selection_seed=seed)).indices() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


class WithIdleLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_modules_without_data_keep_their_first_and_are_named(caplog):
    torch.manual_seed(0)
    model = get_peft_model(WithIdleLayer(), config(selection="wanda_max", r=2, target_modules=["used", "idle"]))
    used, idle = turnrow.select(model, [{"x": torch.randn(8, 4)}])
    assert (used.share is not None, idle.share, idle.index.tolist()) == (True, None, [0, 1])
    assert "say nothing of 1 of 2 modules, where the first are chosen: idle" in caplog.text


@pytest.mark.parametrize("strategy", ["wanda_max", "fisher"])
def test_scores_that_are_not_finite_name_the_module_and_nothing_is_chosen(strategy):
    model = adapt(selection=strategy)
    with torch.no_grad():
        dense_linear(model.base_model.model.model.layers[1].self_attn.k_proj).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"the {strategy} score of row 0 of module 'model.layers.* not finite"):
        turnrow.select(model, padded("llama"))
    assert all(layer.rocoft_row_index["default"].tolist() == [0, 1, 2] for layer in layers(model).values())


def test_a_trained_adapter_is_refused():
    model = adapt(selection="gradient")
    turnrow.select(model, padded("llama"))
    turnrow.select(model, padded("llama"))  # not trained yet: may be chosen anew
    perturb(model)
    with pytest.raises(
        UserError, match="adapter 'default' is trained already: its difference in module 'model.layers.0"
    ):
        turnrow.select(model, padded("llama"))


def test_a_merged_adapter_is_refused():
    model = adapt(selection="gradient")
    model.merge_adapter()
    with pytest.raises(UserError, match="adapter 'default' is merged into the base model: call unmerge_adapter"):
        turnrow.select(model, padded("llama"))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "adapter 'default' selects by 'gradient', which needs data: give select"),
        ([], "selection 'gradient' needs data, but there is no calibration batch"),
    ],
)
def test_data_are_needed(batches, message):
    with pytest.raises(UserError, match=message):
        turnrow.select(adapt(selection="gradient"), batches)


def test_the_wrong_model_or_adapter_is_named():
    with pytest.raises(UserError, match="was given a LlamaForCausalLM; put the adapter in first"):
        turnrow.select(build("llama")[0])
    with pytest.raises(
        UserError, match="there is no adapter 'defautl'; the model has 'default'; did you mean 'default'"
    ):
        turnrow.select(adapt(), adapter_name="defautl")
    lora = get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="adapter 'default' is of LoraConfig; select.. is for RoCoFT"):
        turnrow.select(lora)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selection": "gradiant"}, "selection is 'gradiant'; it must be one of .*; did you mean 'gradient'"),
        ({"selection_seed": 0.5}, "selection_seed is 0.5; it must be a whole number"),
        ({"indices": "nowhere.json"}, "the file 'nowhere.json', which cannot be read"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        RocoftConfig(**fields)


@pytest.mark.parametrize("strategy", ["wanda_max", "fisher"])
def test_memory_does_not_grow_with_the_number_of_batches(strategy):
    batches = padded("llama", batches=1)

    def peak(count: int) -> int:
        model = adapt(selection=strategy)
        gc.collect()
        with LiveBytes() as live:
            turnrow.select(model, batches * count)
        return live.peak

    peak(1)  # whatever is made once
    assert peak(2) == peak(10)


# --- fused experts -------------------------------------------------------------------------------------------------------


def mixture(architecture: str = "mixtral", implementation: str | None = "eager", **fields) -> PeftModel:
    """In float64, but for the kernel of "grouped_mm", which does not know it."""
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    model, _ = build(architecture, dtype=dtype)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return get_peft_model(model, config(**fields))


def expert_sums(model: PeftModel, batches: list[dict], power: int) -> dict[str, torch.Tensor]:
    """Sum over batches of |G| ** power of every fused weight, (E, out, in), G its whole `.grad`."""
    model, sums = model.unload().requires_grad_(True), {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, fused in find_experts(model).items():
            gradient = fused.weight.grad.mT if fused.transposed else fused.weight.grad
            sums[name] = sums.get(name, 0) + gradient.abs() ** power
    return sums


@pytest.mark.parametrize(("strategy", "power"), [("gradient", 1), ("fisher", 2)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "gpt_oss", "llama4"])
def test_the_choice_of_every_expert_is_that_of_slow_scores(architecture, mode, strategy, power):
    batches = padded(architecture)
    implementation = None if architecture == "llama4" else "eager"
    scores = expert_sums(mixture(architecture, implementation, mode=mode), batches, power)
    selection = turnrow.select(mixture(architecture, implementation, mode=mode, selection=strategy), batches)
    of_experts = [chosen for chosen in selection if chosen.module in scores]
    assert len(of_experts) == len(scores) * (2 if mode == "row+column" else 1)
    for chosen in of_experts:
        whole = scores[chosen.module]
        part = {"row": whole.sum(2), "column": whole.sum(1), "entry": whole.flatten(1)}[chosen.part]
        assert chosen.shape == tuple(whole.shape[1:])
        expected = torch.stack([choose_by_score(strategy, own, chosen.index.shape[1]) for own in part])
        assert torch.equal(chosen.index, expected)
        assert chosen.share == pytest.approx(float(part.gather(1, expected).sum() / part.sum()))


def expert_inputs(model: nn.Module, batches: list[dict]) -> dict[str, list[torch.Tensor]]:
    """||X_j|| of every fused weight and expert, from what the module gets and the equations of its experts."""
    squares: dict[str, list] = {}

    def add(name, module, args):
        x, experts, _ = args
        for expert in range(module.num_experts):
            tokens = x[(experts == expert).any(1)]
            gate, up = (tokens @ module.gate_up_proj[expert].t()).chunk(2, dim=-1)
            for weight, inputs in (("gate_up_proj", tokens), ("down_proj", module.act_fn(gate) * up)):
                of_each = squares.setdefault(f"{name}.{weight}", [0] * module.num_experts)
                of_each[expert] = of_each[expert] + inputs.square().sum(0)

    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.register_forward_pre_hook(lambda module, args, name=name: add(name, module, args))
    for batch in batches:
        model(**batch)
    return {name: [square.sqrt() for square in of_each] for name, of_each in squares.items()}


@pytest.mark.parametrize("strategy", [s for s in BY_DATA if s.startswith("wanda")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_the_choice_of_every_expert_by_its_inputs_is_that_of_slow_scores(architecture, mode, strategy):
    batches = padded(architecture)
    base = mixture(architecture, mode=mode).unload().requires_grad_(False)
    norms = expert_inputs(base, batches)
    selection = turnrow.select(mixture(architecture, mode=mode, selection=strategy), batches)
    of_experts = [chosen for chosen in selection if chosen.module in norms]
    assert len(of_experts) == 4 * (2 if mode == "row+column" else 1)
    for chosen in of_experts:
        total = covered = 0.0
        for expert, index in enumerate(chosen.index):
            scores = base.get_parameter(chosen.module)[expert].abs() * norms[chosen.module][expert]
            part = {"row": scores.sum(1), "column": scores.sum(0), "entry": scores.flatten()}[chosen.part]
            assert torch.equal(index, choose_by_score(strategy, part, len(index)))
            total, covered = total + float(part.sum()), covered + float(part[index].sum())
        assert chosen.share == pytest.approx(covered / total)


@pytest.mark.parametrize("strategy", ["wanda_max", "gradient"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_every_implementation_of_the_experts_gives_the_same_scores(architecture, implementation, strategy):
    expected = expert_scores(mixture(architecture), strategy)
    for name, scores in expert_scores(mixture(architecture, implementation), strategy).items():
        torch.testing.assert_close(scores.double(), expected[name].double(), rtol=1e-4, atol=1e-7)
        assert expected[name].any()


def expert_scores(model: PeftModel, strategy: str) -> dict[str, torch.Tensor]:
    """Of the rows, by the name of the weight."""
    base = model.unload()
    weights, parameters = find_experts(base), dict(base.named_parameters())
    gathered = gather(base, weights, padded("mixtral"), strategy)
    assert all(base.get_parameter(name) is parameters[name] for name in weights)
    if strategy == "gradient":
        return {name: statistic.scores("row") for name, statistic in gathered.items()}
    return {name: statistic.scores("row", weights[name].matrices().detach()) for name, statistic in gathered.items()}


@pytest.mark.parametrize("architecture", ["llama4", "jetmoe"])
def test_inputs_of_experts_that_are_multiplied_in_other_ways_are_seen(architecture):
    model = mixture(architecture, implementation=None, selection="wanda_max")
    assert all(chosen.share for chosen in turnrow.select(model, padded(architecture)))


def test_experts_whose_inputs_are_not_seen_are_refused_and_stay_as_they_were(monkeypatch):
    model = mixture(selection="wanda_max")
    experts = model.base_model.model.model.layers[1].mlp.experts.base_layer
    weight = experts.down_proj
    monkeypatch.setattr(experts, "forward", lambda x, *routing: torch.einsum("ti,eoi->to", x, experts.gate_up_proj))
    with pytest.raises(
        UserError, match=r"uses the experts of 'model.layers.1.mlp.experts.gate_up_proj' in a way \(einsum\)"
    ):
        turnrow.select(model, padded("mixtral"))
    assert experts.down_proj is weight


def test_the_choice_for_experts_is_trained_saved_and_given_as_indices(tmp_path):
    model = mixture(selection="gradient")
    with pytest.raises(UserError, match="selects what it trains by data, and has seen none"):
        model(**padded("mixtral")[0])
    selection = turnrow.select(model, padded("mixtral"))
    held = {name: layer.rocoft_row_index["default"].tolist() for name, layer in layers(model).items()}
    assert held == selection.indices()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        build("mixtral", dtype=torch.float64)[0].eval(), tmp_path / "adapter", is_trainable=True
    )
    loaded.set_experts_implementation("eager")
    model(**padded("mixtral")[0]).loss.backward()
    loaded(**padded("mixtral")[0]).loss.backward()  # a loaded adapter knows its indices: training is not refused
    assert torch.equal(output(loaded, padded("mixtral")[0]), output(model, padded("mixtral")[0]))
    (tmp_path / "indices.json").write_text(json.dumps(selection.to_dict()))
    given = turnrow.select(mixture(indices=str(tmp_path / "indices.json")))
    assert (given.strategy, given.indices()) == ("indices", selection.indices())


@pytest.mark.parametrize("strategy", ["fisher", "wanda_min"])
def test_gradients_of_the_user_and_all_else_stay_where_experts_are_chosen(strategy):
    model = mixture(selection=strategy)
    experts = model.base_model.model.model.layers[0].mlp.experts.base_layer
    experts.down_proj.grad = torch.ones_like(experts.down_proj)
    before, weights = state(model), snapshot(model)
    turnrow.select(model, padded("mixtral"))
    assert state(model) == before
    assert identical(snapshot(model), weights)
    assert (experts.down_proj.grad == 1).all()
    assert not experts.down_proj._post_accumulate_grad_hooks


def test_experts_are_chosen_within_their_part_and_idle_ones_keep_their_first():
    model = mixture(selection="gradient", within={"experts.down_proj": "1::2"})
    one = {name: value[:1, :1] for name, value in padded("mixtral")[0].items()}
    one |= {"input_ids": one["input_ids"].expand(1, 2), "labels": one["labels"].expand(1, 2), "attention_mask": None}
    for chosen in turnrow.select(model, [one]):
        if chosen.module.endswith("experts.down_proj"):
            assert (chosen.index % 2 == 1).all()
            # one token, to two of four experts in the first layer
            assert [1, 3, 5] in chosen.index.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["random", "wanda_max", "gradient"])
def test_a_gpu_chooses_the_same_every_time_and_as_the_cpu(strategy):
    def chosen(device: str) -> dict:
        model = adapt(selection=strategy).to(device)
        return turnrow.select(model, padded("llama")).indices()

    assert chosen("cuda") == chosen("cuda") == chosen("cpu")
