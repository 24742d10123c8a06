"""What training loops do: half-precision bases, autocast, gradient accumulation, gradient checkpointing, and memory."""

from __future__ import annotations

import pytest
import torch
from peft import RoadConfig, get_peft_model, inject_adapter_in_model
from peft.tuners._buffer_dict import BufferDict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tuners.models import METHODS, assert_close_by_name, build, configure, identical, output, perturb, snapshot
from turnrow import RocoftConfig

every_method = pytest.mark.parametrize("method", [m for m in METHODS if "bias" not in m])


def _adapted(method, architecture="llama", **to):
    model, inputs = build(architecture, **to)
    model = get_peft_model(model, configure(method, model))
    perturb(model)
    return model.train(), inputs


def _with_another(method):
    base, inputs = build("llama")
    config, other = configure(method, base), configure(method, base)
    model = get_peft_model(base, config)
    model.add_adapter("other", other)
    perturb(model)
    return model.train(), inputs


def _gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_over_a_half_precision_base_are_float32_and_learn(method, dtype):
    model, inputs = _adapted(method, dtype=dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
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


def test_adapters_are_float32_without_a_peft_model_around_them_and_in_the_dtype_of_the_base_on_request():
    model, _ = build("llama", dtype=torch.bfloat16)
    injected = inject_adapter_in_model(configure("row", model), model)
    assert {p.dtype for p in injected.parameters() if p.requires_grad} == {torch.float32}
    model, inputs = build("llama", dtype=torch.bfloat16)
    model = get_peft_model(model, configure("row", model), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    model(**inputs).loss.backward()


@every_method
def test_autocast_gives_the_gradient_of_full_precision_roughly(method):
    model, inputs = _adapted(method)
    model(**inputs).loss.backward()
    exact = _gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    rough = _gradients(model)
    assert {g.dtype for g in rough.values()} == {torch.float32}
    for name in exact:
        assert torch.nn.functional.cosine_similarity(exact[name].flatten(), rough[name].flatten(), dim=0) > 0.97, name


@every_method
def test_accumulated_gradients_equal_those_of_the_whole_batch(method):
    model, inputs = _adapted(method)
    model(**inputs).loss.backward()
    whole = _gradients(model)
    model.zero_grad()
    for i in range(2):
        (model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss / 2).backward()
    assert_close_by_name(_gradients(model), whole, rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(method, use_reentrant, architecture):
    model, inputs = _adapted(method, architecture)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**inputs).loss.backward()
    plain = _gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()
    inner = model.base_model.model
    # transformers 5 gave the method a new name on the way.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
    assert_close_by_name(_gradients(model), plain, rtol=1e-4, atol=1e-6)


@every_method
def test_two_forwards_before_one_backward(method):
    model, inputs = _adapted(method)
    model(**inputs).loss.backward()
    once = _gradients(model)
    model.zero_grad()
    (model(**inputs).loss + model(**inputs).loss).backward()
    assert_close_by_name(_gradients(model), {n: 2 * g for n, g in once.items()}, rtol=1e-4, atol=1e-6)


def _reference_pass(model, inputs):
    with model.disable_adapter():
        output(model, inputs)


def _pass_of_another_adapter(model, inputs):
    model.set_adapter("other")
    output(model, inputs)
    model.set_adapter("default")


def _merge_and_unmerge(model, inputs):
    model.merge_adapter()
    model.unmerge_adapter()


@every_method
@pytest.mark.parametrize(
    "interlude",
    [_reference_pass, _pass_of_another_adapter, _merge_and_unmerge, lambda model, inputs: model.state_dict()],
    ids=["reference pass", "other adapter", "merge and unmerge", "state_dict"],
)
def test_what_happens_between_forward_and_backward_changes_no_gradient(method, interlude):
    model, inputs = _with_another(method)
    base = snapshot(model)
    model(**inputs).loss.backward()
    undisturbed = _gradients(model)
    model.zero_grad()
    loss = model(**inputs).loss
    interlude(model, inputs)
    loss.backward()
    assert_close_by_name(_gradients(model), undisturbed, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        assert_close_by_name(snapshot(model), base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["row", "column"])
def test_after_a_backward_pass_under_another_adapter_the_base_is_as_it_was(mode):
    model, inputs = _with_another(mode)
    base = snapshot(model)
    loss = model(**inputs).loss
    model.set_adapter("other")
    loss.backward()
    assert identical(snapshot(model), base)


@pytest.mark.parametrize("mode", ["row", "column"])
@pytest.mark.parametrize("held", ["base", "frozen adapter", "two adapters"])
def test_gradients_to_the_inputs_are_those_of_the_forward_pass(mode, held):
    model, inputs = _with_another(mode)
    x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def forward():
        if held == "base":
            with model.disable_adapter():
                return model(inputs_embeds=x).logits.sum()
        if held == "frozen adapter":
            model.set_adapter("default", inference_mode=True)
        else:
            model.base_model.set_adapter(["default", "other"])
        return model(inputs_embeds=x).logits.sum()

    (undisturbed,) = torch.autograd.grad(forward(), x)
    loss = forward()
    model.set_adapter("other")
    output(model, inputs)
    (dx,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(dx, undisturbed)


class _LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            # Views of what was there, and tensors changed in place, cost nothing.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("mode", ["row", "column"])
def test_no_gradient_of_a_whole_weight_at_any_moment(mode):
    huge = nn.Sequential(nn.Linear(1000, 2000, bias=False))
    model = get_peft_model(huge, RocoftConfig(mode=mode, r=3, target_modules=["0"]))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    x = torch.randn(4, 1000, requires_grad=True)
    with _LargestTensor() as largest:
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert largest.elements <= 2000 * 4  # an activation, or delta (out, 3); a weight has two million
    assert sum(s.numel() for state in optimizer.state.values() for s in state.values()) < 2.1 * 3 * 2000


def test_the_largest_tensor_of_full_fine_tuning_is_seen():
    huge = nn.Linear(1000, 2000, bias=False)
    with _LargestTensor() as largest:
        huge(torch.randn(4, 1000)).sum().backward()
    assert largest.elements == 2_000_000  # without this the test above would prove nothing


@pytest.mark.parametrize("group_size", [2, 64])
def test_road_merges_without_a_dense_rotation(group_size):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4096)), RoadConfig(group_size=group_size, target_modules=["0"]))
    with _LargestTensor() as largest:
        model.merge_adapter()
        model.unmerge_adapter()
    assert largest.elements <= 8 * 4096


def _saved_bytes(model, inputs):
    """Bytes kept for the backward pass, in storages of their own, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    loss.backward()
    return total


def test_saved_for_backward_columns_least_then_rows_and_road():
    from transformers import LlamaConfig, LlamaForCausalLM

    def build_llama():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=168
        )
        return LlamaForCausalLM(config)

    ids = torch.randint(64, (2, 128))

    def measure(config=None):
        model = build_llama()
        model.requires_grad_(False)
        if config is not None:
            model = get_peft_model(model, config)
        inputs = {"inputs_embeds": torch.randn(2, 128, 64, requires_grad=True), "labels": ids}
        model(**inputs).loss.backward()  # RoAd learns in the first step what it may keep
        return _saved_bytes(model, inputs)

    from peft import LoraConfig

    frozen = measure()
    chosen_features = 2 * 7 * (2 * 128) * 3 * 4  # layers, linears a layer, tokens, r, bytes
    assert measure(RocoftConfig(mode="column")) == frozen + chosen_features
    assert measure(RocoftConfig(mode="row")) <= measure(LoraConfig(r=8, target_modules="all-linear"))
    # RoAd keeps outputs alone, and those of gate and up are kept by the MLP anyway: q, k, v, o and down remain.
    outputs = 2 * 5 * (2 * 128) * 64 * 4
    assert measure(RoadConfig(group_size=8, target_modules="all-linear")) <= frozen + outputs


def _modes(model):
    containers = (nn.ParameterDict, BufferDict)
    return {module.training for module in model.modules() if not isinstance(module, containers)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["row-bias", "column-all-biases", "road_1"])
def test_a_model_keeps_its_mode(method, training):
    base, _ = build("roberta")
    assert _modes(get_peft_model(base.train(training), configure(method, base)).base_model.model) == {training}


@pytest.mark.parametrize(("first", "second"), [("road_1", "row"), ("row", "road_1")])
def test_methods_around_each_other_leave_a_model_in_evaluation(first, second):
    base, _ = build("roberta")
    configs = [configure(method, base) for method in (first, second)]
    model = get_peft_model(base, configs[0], mixed=True)
    model.add_adapter("other", configs[1])
    assert _modes(model.base_model.model) == {False}


def test_experts_in_evaluation_stay_so():
    base, _ = build("mixtral")
    assert _modes(get_peft_model(base, RocoftConfig(r=2)).base_model.model) == {False}
