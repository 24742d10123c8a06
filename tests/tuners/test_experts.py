"""Fused experts: every mode on mixtures of experts, with each implementation of the experts' products that runs on a CPU."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import PeftModel, RoadConfig, get_peft_model
from torch import nn

from tests.tuners.models import (
    MIXTURES,
    OTHER_MIXTURES,
    assert_close_by_name,
    build,
    identical,
    output,
    perturb,
    snapshot,
)
from tests.tuners.test_training_features import _LargestTensor
from turnrow import RocoftConfig
from turnrow.errors import UserError
from turnrow.ops.experts import FusedWeight
from turnrow.tuners.rocoft import RocoftExperts, RocoftExpertWeight
from turnrow.tuners.rocoft.reselection import reselect

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
MODES = {
    "row": {"r": 3},
    "column": {"r": 3},
    "row+column": {"r": 2},
    "entry": {"density": 0.1},
}
every_mode = pytest.mark.parametrize("mode", MODES)
every_mixture = pytest.mark.parametrize("architecture", MIXTURES)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def _base(architecture="mixtral", implementation="grouped_mm", **to):
    model, inputs = build(architecture, **to)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model, inputs


def _adapted(mode="row", architecture="mixtral", implementation="grouped_mm", dtype=None, **fields):
    model, inputs = _base(architecture, implementation, **({} if dtype is None else {"dtype": dtype}))
    model = get_peft_model(model, RocoftConfig(mode=mode, **(MODES[mode] | fields)))
    perturb(model)
    return model, inputs


def _gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


# --- the life of an adapter ----------------------------------------------------------------------------------------------


@every_mode
@every_implementation
@every_mixture
def test_life_of_an_adapter(architecture, implementation, mode, tmp_path):
    base, inputs = _base(architecture, implementation)
    before, reference = snapshot(base), output(base, inputs)
    model = get_peft_model(base, RocoftConfig(mode=mode, **MODES[mode]))
    torch.testing.assert_close(output(model, inputs), reference)  # identity at the start

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(2):
        model(**inputs).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
    adapted = output(model.eval(), inputs)
    assert not torch.allclose(adapted, reference, atol=1e-4)

    with model.disable_adapter():
        assert torch.equal(output(model, inputs), reference)
        assert identical(snapshot(model), before)

    model.merge_adapter()
    assert torch.equal(output(model, inputs), adapted)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), adapted)

    model.save_pretrained(tmp_path)
    other, _ = _base(architecture, implementation)
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(output(loaded, inputs), adapted)

    merged = loaded.merge_and_unload()
    assert torch.equal(output(merged, inputs), adapted)
    assert snapshot(merged).keys() == before.keys()
    assert identical(snapshot(model.unload()), before)


@every_mode
@pytest.mark.parametrize(
    "take_off", ["disable", "switch", "delete", "unmerge", "unload", "state_dict", "exception", "cast"]
)
def test_taking_it_off_leaves_the_base_bit_identical(mode, take_off):
    base, inputs = _base("gpt_oss", dtype=torch.bfloat16)
    before = snapshot(base)
    model = get_peft_model(base, RocoftConfig(mode=mode, **MODES[mode]))
    model.add_adapter("other", RocoftConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    perturb(model)
    live = output(model, inputs)
    changed = snapshot(model)
    assert not torch.equal(
        changed["model.layers.0.mlp.experts.gate_up_proj"], before["model.layers.0.mlp.experts.gate_up_proj"]
    )

    if take_off == "disable":
        model.base_model.disable_adapter_layers()
    elif take_off == "switch":
        model.set_adapter("other")
    elif take_off == "delete":
        model.set_adapter("other")
        output(model, inputs)
        model.delete_adapter("default")
        model.base_model.disable_adapter_layers()
    elif take_off == "unmerge":
        model.merge_adapter()
        assert torch.equal(output(model, inputs), live)
        model.unmerge_adapter()
    elif take_off == "unload":
        model = model.unload()
    elif take_off == "state_dict":
        model.state_dict()
    elif take_off == "cast":
        model.to(torch.float32).to(torch.bfloat16)
    elif take_off == "exception":
        model.base_model.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            output(model, inputs)
        model.base_model.disable_adapter_layers()
    assert identical(snapshot(model), before)


def test_an_exception_among_the_experts_loses_nothing():
    base, inputs = _base()
    before = snapshot(base)
    model = get_peft_model(base, RocoftConfig(r=3))
    perturb(model)
    base.model.layers[1].mlp.experts.base_layer.act_fn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    assert isinstance(base.model.layers[1].mlp.experts.base_layer._parameters["down_proj"], nn.Parameter)
    assert not identical(snapshot(model), before)
    assert identical(snapshot(model.unload()), before)


def test_a_state_dict_of_a_live_model_loads_into_another_and_a_deepcopy_is_independent():
    model, inputs = _adapted("column")
    adapted = output(model, inputs)
    twin = copy.deepcopy(model)
    other, _ = _base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)  # another base, which the state replaces with all else
    other = get_peft_model(other, RocoftConfig(mode="column", r=3))
    perturb(other)
    output(other, inputs)
    for module in model.modules():
        if isinstance(
            module, RocoftExperts
        ):  # as sharding does: copies, taken before the adapter's tensors are reached
            module.base_layer.register_state_dict_post_hook(
                lambda _module, state, _prefix, _metadata: state.update({k: v.clone() for k, v in state.items()})
            )
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, inputs), adapted)
    assert identical(snapshot(other.unload()), snapshot(_base()[0]))
    model.unload()
    assert torch.equal(output(twin, inputs), adapted)
    assert identical(snapshot(twin.unload()), snapshot(_base()[0]))


def test_safe_merge_refuses_broken_values_and_changes_nothing():
    model, _ = _adapted()
    before = snapshot(model)
    broken = next(p for n, p in model.named_parameters() if "down_proj.rocoft_row" in n)
    with torch.no_grad():
        broken[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.base_model.model.model.layers[0].mlp.experts.down_proj.merge(safe_merge=True)
    assert identical(snapshot(model), before)


# --- several adapters ----------------------------------------------------------------------------------------------------


@every_mode
def test_two_adapters_keep_apart(mode):
    model, inputs = _adapted(mode)
    reference = output(_base()[0], inputs)
    first = output(model, inputs)
    model.add_adapter("second", RocoftConfig(r=1))
    assert torch.equal(output(model, inputs), first)
    model.set_adapter("second")
    torch.testing.assert_close(output(model, inputs), reference)
    model.set_adapter("default")
    assert torch.equal(output(model, inputs), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".second" in n} == set()


@every_mode
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_several_active_adapters_add_up(architecture, mode):
    model, inputs = _adapted(mode, architecture)
    base = snapshot(_base(architecture)[0])
    # other rows of some of the weights: a weight may have one adapter, or both
    second = RocoftConfig(indices=[2, 5], target_modules=[], target_parameters=["layers.0.mlp.experts.down_proj"])
    model.add_adapter("second", second)
    perturb(model)
    model.base_model.set_adapter(["default", "second"])
    both = output(model, inputs)
    assert torch.equal(
        snapshot(model)["model.layers.0.mlp.experts.down_proj"], base["model.layers.0.mlp.experts.down_proj"]
    )
    assert all(torch.isfinite(g).all() for g in _gradients(model, inputs).values())
    model.base_model.merge_adapter(["default", "second"])
    torch.testing.assert_close(output(model, inputs), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert identical(snapshot(model), base)


@every_mode
@every_implementation
def test_overlay_agrees_with_live(mode, implementation):
    live, inputs = _adapted(mode, "gpt_oss", implementation)
    overlay, _ = _adapted(mode, "gpt_oss", implementation)
    for module in overlay.modules():
        if isinstance(module, RocoftExpertWeight):
            module.weight_is_shared = True
    assert_close_by_name(_gradients(overlay, inputs), _gradients(live, inputs), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output(overlay, inputs), output(live, inputs))
    experts = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(snapshot(overlay)[experts], snapshot(_base("gpt_oss")[0])[experts])


# --- gradients -----------------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [(a, i) for a in MIXTURES for i in IMPLEMENTATIONS] + [(a, None) for a in OTHER_MIXTURES],
)
def test_gradients_are_those_of_the_whole_weights_at_the_trained_places(architecture, implementation, mode):
    # torch has no grouped product of float64
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    model, inputs = _adapted(mode, architecture, implementation, dtype=dtype)
    got = _gradients(model, inputs)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RocoftExpertWeight)}
    assert len(layers) == (8 if architecture == "jetmoe" else 4)
    reference = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    reference(**inputs).loss.backward()
    for name, layer in layers.items():
        holder, _, weight = name.removeprefix("base_model.model.").rpartition(".")
        plain = reference.get_submodule(holder)
        d_weight = getattr(plain, weight).grad
        d_weight = d_weight.transpose(1, 2) if layer.base_layer.transposed else d_weight
        for part in layer.parts("default"):
            expected = part.ops.keep(d_weight, part.index)
            if part.rest is not None:
                expected = expected.gather(1, part.rest.unsqueeze(2).expand(-1, -1, expected.shape[2]))
            tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {}
            torch.testing.assert_close(got[f"{name}.rocoft_{part.name}.default"], expected, **tolerance)


@pytest.mark.parametrize("mode", ["row", "column", "row+column"])
@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [
        ("mixtral", "eager"),
        ("mixtral", "grouped_mm"),
        ("gpt_oss", "eager"),
        ("gpt_oss", "grouped_mm"),
        ("llama4", None),
    ],
)
def test_no_gradient_of_a_whole_matrix_of_any_expert_at_any_moment(mode, implementation, architecture):
    model, _ = _base(architecture, implementation)
    hidden, between = 160, 96
    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size = hidden, between
    block = model.model.layers[0]
    experts = type((block.feed_forward if architecture == "llama4" else block.mlp).experts)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    holder = get_peft_model(
        nn.Sequential(nn.ModuleDict({"experts": experts})),
        RocoftConfig(
            mode=mode, r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        ),
    )
    layer = next(m for m in holder.modules() if isinstance(m, RocoftExperts))
    x = torch.randn(12, hidden, requires_grad=True)
    routing = () if architecture == "llama4" else (torch.arange(24).view(12, 2) % 4, torch.rand(12, 2))
    with _LargestTensor() as largest:
        layer(x, *routing).square().sum().backward()
    assert all(p.grad is not None for p in holder.parameters() if p.requires_grad)
    assert largest.elements < hidden * between  # the smaller of the two matrices of one expert; there are four
    assert largest.elements >= 12 * hidden  # an activation: without this the test would prove nothing


class _Strange(nn.Module):
    """Uses its weight in ways that nobody foresaw."""

    has_gate, is_transposed = False, False

    def __init__(self, use) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 6, 4, dtype=torch.float64))
        self.use = use

    def forward(self, x):
        return self.use(x, self.up_proj)


class _Opaque(torch.autograd.Function):
    """A kernel of its own, which torch does not see into."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return torch.einsum("ti,eoi->teo", x, weight)

    @staticmethod
    def backward(ctx, dy):
        return None, torch.einsum("teo,ti->eoi", dy, ctx.saved_tensors[0])


@every_mode
@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: torch.einsum("ti,eoi->teo", x, w),
        lambda x, w: _Opaque.apply(x, w),
        lambda x, w: x @ w[1].T + (x @ w[-1].mT) * w.mean(),
        lambda x, w: torch.nn.functional.linear(x, w[torch.tensor(2)]) @ w[0].t().t(),
        lambda x, w: torch.nn.functional.linear(x, w[0, 1:]),
        lambda x, w: torch.nn.functional.linear(x, 2 * w[1]),
        lambda x, w: torch.bmm(w, x.t().expand(3, 4, 5)),
        lambda x, w: torch.bmm(x.expand(3, 5, 4), w.transpose(1, 2)),
        lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2, 1, 0])], x.unsqueeze(2)),
        lambda x, w: torch.bmm(w[torch.tensor([2, 0])], x.t().expand(2, 4, 5)),
        lambda x, w: (w[torch.tensor([2, 0, 2])] * x[0]).sum(-1),
        lambda x, w: x @ w[torch.tensor([False, True, True])].mT,
        lambda x, w: x @ w.reshape(18, 4).t(),
        lambda x, w: torch.stack([x @ m.t() for m in w]),
        lambda x, w: torch.stack([x @ m.t() for m in w.unbind()]),
        lambda x, w: w[1] @ x.t(),
        lambda x, w: w[1] @ w[2].t(),
        lambda x, w: torch.cat([x @ w[0].t(), x[:0] @ w[1].t()]),
    ],
)  # fmt: skip
def test_any_other_use_of_the_weight_has_the_right_gradient(use, mode):
    torch.manual_seed(0)
    experts = _Strange(use)
    whole = experts.up_proj.detach().clone()
    config = RocoftConfig(mode=mode, target_modules=[], target_parameters=["0.up_proj"], **(MODES[mode]))
    model = get_peft_model(nn.Sequential(experts), config)
    perturb(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    y = model(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    layer = next(m for m in model.modules() if isinstance(m, RocoftExpertWeight))
    whole = layer._values().clone().requires_grad_()
    expected = use(x, whole)
    torch.testing.assert_close(y, expected)
    expected.backward(dy)
    for part in layer.parts("default"):
        gradient = part.ops.keep(whole.grad, part.index)
        if part.rest is not None:
            gradient = gradient.gather(1, part.rest.unsqueeze(2).expand(-1, -1, gradient.shape[2]))
        torch.testing.assert_close(part.parameter.grad, gradient)


# --- what training loops do ----------------------------------------------------------------------------------------------


@every_mode
@every_implementation
def test_half_precision_bases_learn_in_float32(mode, implementation):
    model, inputs = _adapted(mode, "qwen2_moe", implementation, dtype=torch.bfloat16)
    trainable = [p for p in model.train().parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        loss.backward()
        assert {p.grad.dtype for p in trainable} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_implementation
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(implementation, use_reentrant):
    model, inputs = _adapted("row+column", "mixtral", implementation)
    plain = _gradients(model.train(), inputs)
    model.enable_input_require_grads()
    inner = model.base_model.model
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    assert_close_by_name(_gradients(model, inputs), plain, rtol=1e-4, atol=1e-6)


@every_implementation
def test_autocast_gives_the_gradient_of_full_precision_roughly(implementation):
    model, inputs = _adapted("row+column", "mixtral", implementation)
    exact = _gradients(model, inputs)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            likeness = torch.nn.functional.cosine_similarity(exact[name].flatten(), parameter.grad.flatten(), dim=0)
            assert likeness > 0.97, name


def test_two_forwards_before_one_backward_and_inference_between():
    model, inputs = _adapted()
    once = _gradients(model, inputs)
    model.zero_grad()
    first = model(**inputs).loss
    with torch.inference_mode():
        model(**inputs)
    (first + model(**inputs).loss).backward()
    twice = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close_by_name(twice, {n: 2 * g for n, g in once.items()}, rtol=1e-4, atol=1e-6)


@every_mode
def test_functional_transforms_see_the_exact_gradient(mode):
    model, inputs = _adapted(mode, "mixtral", "eager", dtype=torch.float64)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (), inputs).loss)(parameters)
    assert_close_by_name(got, _gradients(model, inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers
def test_grouped_products_compile_without_a_graph_break(monkeypatch):
    model, inputs = _adapted("row+column", "mixtral", dtype=torch.bfloat16)  # transformers compiles no other dtype
    inputs = inputs | {"use_cache": False}
    eager = model(**inputs).loss
    gradients = _gradients(model, inputs)
    model.state_dict()  # restores the base: under torch.compile a live weight cannot be
    # transformers 5.6 writes to a log on the way, which would break the graph
    monkeypatch.setattr(torch._dynamo.config, "ignore_logging_functions", {logging.Logger.debug})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, eager, rtol=1e-3, atol=0)
    for name, got in _gradients(compiled, inputs).items():
        expected = gradients[name.removeprefix("_orig_mod.")].flatten()
        assert torch.nn.functional.cosine_similarity(got.flatten(), expected, dim=0) > 0.99, name


def test_biases_of_the_experts_are_trained_as_differences(tmp_path):
    base, inputs = _base("gpt_oss")
    before = snapshot(base)
    model = get_peft_model(base, RocoftConfig(r=2, bias="rocoft_only"))
    name = "base_model.model.model.layers.1.mlp.experts.down_proj.rocoft_bias.default"
    assert model.get_parameter(name).shape == (4, 16)
    perturb(model)
    assert _gradients(model, inputs)[name].any()
    adapted = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_base("gpt_oss")[0], tmp_path).eval()
    torch.testing.assert_close(output(loaded, inputs), adapted)
    torch.testing.assert_close(output(loaded.merge_and_unload(), inputs), adapted, rtol=1e-4, atol=1e-5)
    assert identical(snapshot(model.unload()), before)


# --- which experts -------------------------------------------------------------------------------------------------------


def _expert_weights(model):
    names = (n for n, m in model.named_modules() if isinstance(m, RocoftExpertWeight))
    return [n.removeprefix("base_model.model.model.layers.") for n in names]


ALL = [f"{layer}.mlp.experts.{weight}" for layer in (0, 1) for weight in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ALL),
        ({"target_modules": "all-linear"}, ALL),
        ({"layers_to_transform": [1]}, ALL[2:]),
        ({"exclude_modules": ["experts"]}, []),
        ({"exclude_modules": ["experts.gate_up_proj"]}, ALL[1::2]),
        ({"target_parameters": []}, []),
        ({"target_parameters": ["down_proj"]}, ALL[1::2]),
        ({"target_parameters": ["down_proj"], "layers_to_transform": 0}, ALL[1:2]),
        ({"target_modules": ["q_proj"], "target_parameters": ["0.mlp.experts.down_proj"]}, ALL[1:2]),
        ({"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}, ALL[::2]),
        ({"target_modules": ["q_proj"], "target_parameters": []}, []),
    ],
)
def test_which_experts_are_trained(fields, expected, tmp_path):
    model, inputs = _base()
    model = get_peft_model(model, RocoftConfig(r=1, **fields))
    assert _expert_weights(model) == expected
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_base()[0], tmp_path)  # without a warning
    assert _expert_weights(loaded) == expected
    assert torch.equal(output(loaded.eval(), inputs), output(model, inputs))


def test_experts_that_are_left_out_are_named_in_a_warning_once(tmp_path):
    model, _ = _base()
    message = r"not trained: they are fused parameters, 'model.layers.0.mlp.experts.gate_up_proj' and 3 more.*target_parameters"
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(model, RocoftConfig(r=1, target_modules=["q_proj", "v_proj"]))
    assert _expert_weights(model) == []
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(_base()[0], tmp_path)


def test_road_names_the_experts_it_does_not_reach():
    model, _ = _base("qwen2_moe")
    with pytest.warns(
        UserWarning, match=r"experts.gate_up_proj' and 3 more.*RoAd turns the outputs of linear layers alone"
    ):
        model = get_peft_model(model, RoadConfig(group_size=8, target_modules="all-linear"))
    assert not any("shared_expert_gate" in name for name in model.base_model.targeted_module_names)


def test_experts_that_cannot_be_adapted_are_named():
    class OddExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(3, 4, 2))

    model = nn.Sequential(nn.Linear(2, 4), OddExperts())
    with pytest.warns(UserWarning, match="experts in '1' are not trained: a OddExperts holds them quantized, or"):
        get_peft_model(model, RocoftConfig(r=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": "experts.down_proj"}, r"must be None or a list of names, such as \['experts.down_proj'\]"),
        ({"target_parameters": ["experts.dwn_proj"]}, r"'experts.dwn_proj'; did you mean .*'experts.down_proj'"),
        ({"target_parameters": ["q_proj.weight"]}, r"'q_proj.weight' is of shape \[16, 16\] and float32 in a Linear.*its module belongs"),
        ({"target_parameters": ["mlp.gate.weight"]}, r"'mlp.gate.weight' is of shape \[4, 16\] and float32 in a MixtralTopKRouter"),
        ({"target_parameters": ["layers.0.mlp.experts.down_proj"], "layers_to_transform": [1]}, r"leave nothing to adapt.*layers_to_transform \[1\]"),
        ({"target_parameters": ["down_proj"], "exclude_modules": ["experts"]}, r"leave nothing to adapt: exclude_modules"),
        ({"target_modules": ["experts"]}, r"'model.layers.0.mlp.experts' is a MixtralExperts; .*target_parameters=\['experts.gate_up_proj', 'experts.down_proj'\]"),
        ({"target_modules": ["down_proj"]}, r"'down_proj' \(fused weights of experts: name them in target_parameters\)"),
        ({"r": 17, "mode": "column", "rank_pattern": {"_proj": 1}, "target_modules": []}, r"r is 17, but module '\S+experts.gate_up_proj' has only 16 columns"),
        ({"indices": [[0], [1]], "target_modules": []}, r"experts.gate_up_proj' are 2 lists of 1 numbers; 4 lists of one length"),
        ({"indices": [[0], [1], [2], [3, 4]], "target_modules": []}, r"are 4 lists of 1 and 2 numbers; 4 lists of one length are needed"),
        ({"indices": [[0], [1], [2], [99]], "target_modules": []}, r"gate_up_proj, expert 3' contain 99, which is out of range: it has 48 rows"),
        ({"indices": {"experts.up": [1]}}, r"indices: no target module is called 'experts.up'"),
        ({"bias": "rocoft_only"}, r"the model has no bias there to train"),
    ],
)  # fmt: skip
def test_bad_targets_are_named_and_the_model_is_untouched(fields, message):
    model, inputs = _base()
    before, reference = snapshot(model), output(model, inputs)
    fields = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} | fields
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, RocoftConfig(**fields))
    assert identical(snapshot(model), before)
    assert torch.equal(output(model, inputs), reference)
    assert not any(isinstance(m, RocoftExperts) for m in model.modules())


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of a model that has an adapter already
def test_experts_under_another_adapter_are_refused():
    from peft import LoraConfig
    from peft import get_peft_model as wrap
    from peft.tuners.lora.layer import ParamWrapper

    model, _ = _base()
    wrap(model, LoraConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    assert any(isinstance(m, ParamWrapper) for m in model.modules())
    with pytest.raises(ValueError, match="have an adapter of another method, a ParamWrapper"):
        wrap(model, RocoftConfig(r=1, target_modules=[], target_parameters=["experts.down_proj"]))


def test_each_expert_may_have_its_own_indices_and_weights_their_own_rank(tmp_path):
    model, inputs = _base()
    own = [[0, 5], [7, 1], [2, 3], [15, 4]]
    config = RocoftConfig(
        r=2, indices={"layers.1.mlp.experts.down_proj": own, "layers.0.mlp.experts.down_proj": [9]},
        rank_pattern={"experts.gate_up_proj": 5},
    )  # fmt: skip
    model = get_peft_model(model, config)
    layers = model.base_model.model.model.layers
    assert layers[1].mlp.experts.down_proj.rocoft_row_index["default"].tolist() == own
    assert layers[0].mlp.experts.down_proj.rocoft_row_index["default"].tolist() == [[9]] * 4
    assert layers[0].mlp.experts.gate_up_proj.rocoft_row["default"].shape == (4, 5, 16)
    layers[1].mlp.experts.down_proj.set_index("default", "row", torch.tensor(own).flip(1))
    perturb(model)
    adapted = output(model, inputs)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.experts.down_proj.rocoft_row"
    assert tensors[key].shape == (4, 2, 24)
    assert tensors[f"{key}_index"].tolist() == torch.tensor(own).flip(1).tolist()
    assert torch.equal(output(PeftModel.from_pretrained(_base()[0], tmp_path).eval(), inputs), adapted)
    lean = PeftModel.from_pretrained(_base()[0], tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(output(lean, inputs), adapted)


def test_the_experts_still_show_what_models_read_of_them():
    model, _ = _adapted()
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert experts.num_experts == 4
    assert isinstance(experts.down_proj.base_layer, FusedWeight)
    with pytest.raises(AttributeError, match="nothing"):
        experts.nothing  # noqa: B018


# --- beside what linear layers can do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("interlude", ["reference pass", "other adapter", "merge and unmerge", "state_dict"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["row", "column"])
def test_what_happens_between_forward_and_backward_changes_no_gradient(mode, implementation, interlude):
    model, inputs = _adapted(mode, implementation=implementation)
    model.add_adapter("other", RocoftConfig(mode="row+column", r=2))
    perturb(model)
    base = snapshot(model)
    undisturbed = _gradients(model, inputs)
    model.zero_grad()
    loss = model(**inputs).loss
    if interlude == "reference pass":
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
    elif interlude == "other adapter":
        model.set_adapter("other")
        model(**inputs)
        model.set_adapter("default")
    elif interlude == "merge and unmerge":
        model.merge_adapter()
        model.unmerge_adapter()
    else:
        model.state_dict()
    loss.backward()
    disturbed = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close_by_name(disturbed, undisturbed, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        assert identical(snapshot(model), base)


@pytest.mark.parametrize("selection", ["last", "uniform", "random"])
def test_experts_are_selected_without_data(selection):
    model, _ = _base()
    model = get_peft_model(model, RocoftConfig(r=2, selection=selection))
    for layer in (m for m in model.modules() if isinstance(m, RocoftExpertWeight)):
        rows = layer.rocoft_row_index["default"]
        assert rows.unique().tolist() != [0, 1]
        if selection == "last":
            assert rows.tolist() == [[layer.out_features - 2, layer.out_features - 1]] * len(rows)


def test_reselection_and_batches_of_several_adapters_and_mixed_models_are_refused():
    model, inputs = _adapted()
    with pytest.raises(UserError, match="reselection is for linear layers, not for fused experts"):
        reselect(model, None, strategy="cycle")
    with pytest.raises(UserError, match="adapter_names cannot be used with an adapter on .*experts"):
        model(**inputs, adapter_names=["default"] * len(inputs["input_ids"]))
    with pytest.raises(UserError, match="a mixed model cannot train fused experts"):
        get_peft_model(_base()[0], RocoftConfig(), mixed=True)


def test_sharded_experts_are_not_changed_in_place():
    model, inputs = _adapted()
    expected = output(model, inputs)
    model.state_dict()
    base = {name: value for name, value in snapshot(model).items() if "experts" in name}
    for module in model.modules():
        if isinstance(module, RocoftExperts):
            module.base_layer._is_fsdp_managed_module = True
    torch.testing.assert_close(output(model, inputs), expected)
    assert identical({name: value for name, value in snapshot(model).items() if name in base}, base)
    with pytest.raises(UserError, match="the base weights are sharded"):
        model.merge_adapter()
