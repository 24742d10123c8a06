"""Under torch.compile: one graph, the numbers of eager mode, and no new graph for another adapter of equal shape."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MixtralConfig, MixtralForCausalLM

from tests.tuners.models import METHODS, build, configure, perturb
from turnrow import RocoftConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Output(NamedTuple):
    loss: torch.Tensor


class _Network(nn.Module):
    """Two linear layers with a bias: what is asked of a layer shows here as well as in a transformer, and compiles at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        y = self.second(nn.functional.gelu(self.first(x)))
        return _Output(y.square().mean())


def _build(architecture):
    if architecture is not None:
        return build(architecture)
    torch.manual_seed(0)
    return _Network(), {"x": torch.randn(2, 5, 16)}


def _model(method, architecture=None):
    model, inputs = _build(architecture)
    model = get_peft_model(model, configure(method, model))
    model.add_adapter("other", configure(method, _build(architecture)[0]))
    perturb(model)
    return model, inputs


def _step(call, model, inputs):
    """Loss and gradients of one training step."""
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("method", "architecture"), [*((method, None) for method in METHODS), ("row", "llama"), ("road_1", "roberta")]
)
def test_a_training_step_is_one_graph_and_switching_adapters_makes_no_other(method, architecture):
    model, inputs = _model(method, architecture)
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = _step(model, model, inputs)
    model.set_adapter("default")  # takes the adapter off the weights that the eager steps wrote it to
    counter = CompileCounterWithBackend("aot_eager")
    # Not the PeftModel around it, whose own forward asks for the name of the adapter.
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(_step(compiled, model, inputs), expected[name], rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1
    assert not torch.allclose(expected["default"][0], expected["other"][0], atol=1e-6)


@pytest.mark.parametrize("method", ["row+column", "entry", "road_1"])
def test_eager_and_compiled_calls_may_alternate(method):
    model, inputs = _model(method)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    first = _step(model, model, inputs)  # leaves the weights live
    torch.testing.assert_close(_step(compiled, model, inputs), first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(_step(model, model, inputs), first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["row+column", "entry", "road_2"])
def test_compiled_training_sees_each_new_value_of_the_parameters(method):
    model, inputs = _model(method)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        losses.append(_step(compiled, model, inputs)[0])
        optimizer.step()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(_step(compiled, model, inputs)[0], _step(model, model, inputs)[0])


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_adapted_experts_compile_to_one_graph_with_the_numbers_of_eager_mode(implementation):
    if implementation == "grouped_mm" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("there the base model itself does not compile")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=64, max_position_embeddings=40, **sizes, **heads))
    base.set_experts_implementation(implementation)
    model = get_peft_model(base, RocoftConfig(r=3))
    perturb(model)
    tokens = torch.randint(3, 64, (2, 10))
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    expected = _step(model, model, inputs)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_step(compiled, model, inputs), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++ on the CPU")
@pytest.mark.parametrize("method", ["row", "column", "row+column", "entry", "road_1"])
def test_inductor_gives_the_numbers_of_eager_mode(method):
    model, inputs = _model(method, "llama")
    expected = _step(model, model, inputs)
    compiled = torch.compile(model.get_base_model(), backend="inductor", fullgraph=True)
    torch.testing.assert_close(_step(compiled, model, inputs), expected, rtol=1e-4, atol=1e-6)
