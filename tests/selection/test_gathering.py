"""Statistics from hooks on the real forward, against slow references that know nothing of hooks."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.measure import LiveBytes
from tests.tuners.models import ARCHITECTURES, build
from turnrow.errors import UserError
from turnrow.selection import GradientSums, InputNorms, gather

PARTS = ("row", "column", "entry")
VOCABULARY = 64


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and name != "lm_head"}


def weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()


def row_scores(statistic: InputNorms | GradientSums, layer: nn.Module) -> torch.Tensor:
    return statistic.scores("row", weight(layer)) if isinstance(statistic, InputNorms) else statistic.scores("row")


def padded(architecture: str, batches: int = 3) -> list[dict]:
    """Batches of rows of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(batches):
        lengths = [4 + number, 9, 2]
        ids = torch.ones(3, 9, dtype=torch.int64)
        mask = torch.zeros(3, 9, dtype=torch.int64)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(3, VOCABULARY, (length,), generator=generator)
            mask[row, :length] = 1
        labels = torch.tensor([0, 2, 1]) if architecture == "roberta" else ids.masked_fill(mask == 0, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def autograd_sums(model: nn.Module, batches: list[dict], power: int) -> dict[str, torch.Tensor]:
    """Sum over batches of |G| ** power, G the `.grad` of the whole weight."""
    layers = linears(model)
    sums = {name: torch.zeros_like(weight(layer)) for name, layer in layers.items()}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, layer in layers.items():
            gradient = layer.weight.grad.t() if isinstance(layer, Conv1D) else layer.weight.grad
            sums[name] += gradient.abs() ** power
    model.zero_grad()
    return sums


def norms_of_rows_alone(model: nn.Module, batches: list[dict]) -> dict[str, torch.Tensor]:
    """||X_j|| over all tokens, every row run alone and without its padding."""
    squares: dict[str, torch.Tensor] = {}
    handles = []

    def add(name: str, x: torch.Tensor) -> None:
        squares[name] = squares.get(name, 0) + x.detach().reshape(-1, x.shape[-1]).square().sum(0)

    for name, layer in linears(model).items():
        handles.append(layer.register_forward_pre_hook(lambda layer, args, name=name: add(name, args[0])))
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask == 1][None])
    for handle in handles:
        handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


@pytest.mark.parametrize("architecture", ["llama", "roberta", "gpt2"])
def test_wanda_scores_equal_those_of_every_row_run_alone_without_padding(architecture):
    model, _ = build(architecture, dtype=torch.float64)
    batches = padded(architecture)
    norms = norms_of_rows_alone(model, batches)
    gathered = gather(model, linears(model), batches, "wanda_max")
    assert gathered.keys() == norms.keys()
    for name, layer in linears(model).items():
        scores = weight(layer).abs() * norms[name]
        torch.testing.assert_close(gathered[name].scores("row", weight(layer)), scores.sum(1))
        torch.testing.assert_close(gathered[name].scores("column", weight(layer)), scores.sum(0))
        torch.testing.assert_close(gathered[name].scores("entry", weight(layer)), scores.flatten())


@pytest.mark.parametrize(("strategy", "power"), [("gradient", 1), ("fisher", 2)])
@pytest.mark.parametrize("architecture", ["llama", "roberta", "gpt2"])
def test_gradient_scores_equal_those_of_autograd(architecture, strategy, power):
    model, _ = build(architecture, dtype=torch.float64)
    batches = padded(architecture)
    expected = autograd_sums(model, batches, power)
    model.requires_grad_(False)
    gathered = gather(model, linears(model), batches, strategy, PARTS)
    for name in linears(model):
        assert gathered[name].count == 3
        scores = {part: gathered[name].scores(part) for part in PARTS}
        torch.testing.assert_close(scores["row"], expected[name].sum(1))
        torch.testing.assert_close(scores["column"], expected[name].sum(0))
        torch.testing.assert_close(scores["entry"], expected[name].flatten())
        assert scores["row"].any()


@pytest.mark.parametrize("strategy", ["wanda_max", "gradient"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_reaches_every_layer(architecture, strategy):
    model, inputs = build(architecture)
    expected = autograd_sums(model, [inputs], 1)
    gathered = gather(model, linears(model), [inputs], strategy)
    for name, layer in linears(model).items():
        if strategy == "gradient":
            scores = gathered[name].scores("row")
            torch.testing.assert_close(scores, expected[name].sum(1).to(scores), atol=1e-5, rtol=1e-3)
        else:
            assert gathered[name].scores("row", weight(layer)).all()


class AddsInPlace(nn.Module):
    """Overwrites what a biased layer returns: to autograd a view of its two-dimensional product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        y = self.second(self.first(x))
        y += x
        return SimpleNamespace(loss=y.square().sum())


def test_a_model_that_adds_in_place_to_the_output_of_a_biased_layer_is_followed():
    model = AddsInPlace()
    batch = {"x": torch.randn(2, 3, 4)}
    layers = {"first": model.first, "second": model.second}
    expected = torch.autograd.grad(model(**batch).loss, [layer.weight for layer in layers.values()])
    gathered = gather(model, layers, [batch], "gradient")
    for name, gradient in zip(layers, expected, strict=True):
        torch.testing.assert_close(gathered[name].scores("row"), gradient.abs().sum(1).double())


class Int8Linear(nn.Module):
    """Holds no floating-point weight, as quantized layers do."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dense(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dense().t()


@pytest.mark.parametrize("strategy", ["wanda_max", "fisher"])
def test_quantized_layers_count_as_their_dense_weights(strategy):
    dense, quantized = build("llama", dtype=torch.float64)[0], build("llama", dtype=torch.float64)[0]
    for name, layer in linears(quantized).items():
        low = Int8Linear(layer.weight.detach())
        quantized.set_submodule(name, low)
        dense.get_submodule(name).weight.data = low.dense()
    replaced = {name: quantized.get_submodule(name) for name in linears(dense)}
    expected = gather(dense, linears(dense), padded("llama"), strategy)
    gathered = gather(quantized, replaced, padded("llama"), strategy)
    for name, layer in linears(dense).items():
        torch.testing.assert_close(row_scores(gathered[name], layer), row_scores(expected[name], layer))


class Twice(nn.Module):
    """Calls one layer twice, and a second one whose output only sometimes matters."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, last: bool = True) -> SimpleNamespace:
        y = self.shared(x)
        again = self.shared(y.tanh())
        self.idle(x)
        return SimpleNamespace(loss=(again if last else y).square().mean())


@pytest.mark.parametrize("last", [True, False], ids=["both-calls-matter", "one-call-matters"])
def test_a_layer_called_twice_has_one_gradient(last):
    model = Twice()
    batches = [{"x": torch.randn(5, 4), "last": last} for _ in range(2)]
    expected = torch.zeros(4, 4)
    for batch in batches:
        (gradient,) = torch.autograd.grad(model(**batch).loss, model.shared.weight)
        expected += gradient.abs()
    gathered = gather(model, {"shared": model.shared, "idle": model.idle}, batches, "gradient")
    torch.testing.assert_close(gathered["shared"].scores("row"), expected.sum(1).double())
    assert (gathered["shared"].count, gathered["idle"].count) == (2, 0)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        y = self.layer(x)
        x.zero_()
        return SimpleNamespace(loss=y.sum())


def test_an_overwritten_input_is_noticed():
    model = Overwriting()
    with pytest.raises(UserError, match="overwrites the input of module 'layer' after use"):
        gather(model, {"layer": model.layer}, [{"x": torch.ones(2, 4)}], "gradient")


def test_padding_of_the_decoder_does_not_count_either():
    model, _ = build("t5", dtype=torch.float64)
    source = torch.tensor([[5, 6, 7, 8]])
    row = {"input_ids": source, "labels": torch.tensor([[9, 10]])}
    padded = {
        "input_ids": source,
        "attention_mask": torch.ones_like(source),
        "labels": torch.tensor([[9, 10, -100, -100]]),
    }
    layers = linears(model)
    alone, beside = gather(model, layers, [row], "wanda_max"), gather(model, layers, [padded], "wanda_max")
    # the decoder's keys and values read the encoder's four tokens, and its mask says two
    for name in [n for n in layers if "EncDecAttention" not in n or ".q" in n or ".o" in n]:
        torch.testing.assert_close(
            beside[name].scores("column", weight(layers[name])), alone[name].scores("column", weight(layers[name]))
        )


def state(model: nn.Module) -> list:
    flags = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return [[m.training for m in model.modules()], hooks, flags, torch.are_deterministic_algorithms_enabled()]


def same(first: list, second: list) -> bool:
    return first[:2] + first[3:] == second[:2] + second[3:] and all(
        a[0] == b[0] and a[1] is b[1] and torch.equal(a[2], b[2]) for a, b in zip(first[2], second[2], strict=True)
    )


@pytest.mark.parametrize("strategy", ["wanda_max", "gradient"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(strategy, error):
    model, _ = build("roberta")
    model.train()
    model.roberta.encoder.layer[0].eval()
    model.roberta.embeddings.requires_grad_(False)
    before = state(model)

    def batches():
        yield padded("roberta")[0]
        if error:
            raise error
        yield padded("roberta")[1]

    if error:
        with pytest.raises(error):
            gather(model, linears(model), batches(), strategy)
    else:
        gather(model, linears(model), batches(), strategy)
    assert same(before, state(model))


@pytest.mark.parametrize("strategy", ["wanda_max", "gradient"])
def test_dropout_is_off_and_the_callers_grad_mode_does_not_matter(strategy):
    model, _ = build("roberta")
    layers, batches = linears(model), padded("roberta")
    expected = gather(model, layers, batches, strategy)
    model.train()
    with torch.no_grad():
        again = gather(model, layers, batches, strategy)
    for name, layer in layers.items():
        assert torch.equal(row_scores(again[name], layer), row_scores(expected[name], layer))


@pytest.mark.parametrize("strategy", ["wanda_max", "gradient"])
def test_memory_does_not_grow_with_the_number_of_batches(strategy):
    model, _ = build("llama")
    model.requires_grad_(False)
    layers, batches = linears(model), padded("llama", batches=1)
    gather(model, layers, batches, strategy)  # whatever is made once

    def use(count: int) -> tuple[int, int]:
        gc.collect()
        with LiveBytes() as live:
            gathered = gather(model, layers, batches * count, strategy)
            gc.collect()
        assert len(gathered) == len(layers)
        return live.now, live.peak

    # the second batch is the first that finds the statistics of another one there
    assert use(2) == use(10)


def test_at_most_one_weights_gradient_is_alive_at_a_time(monkeypatch):
    from turnrow.selection import gathering

    model, _ = build("llama")
    alive: list[weakref.ref] = []
    formed = gathering.weight_gradient

    def watched(x, dy):
        assert not any(reference() is not None for reference in alive)
        gradient = formed(x, dy)
        alive.append(weakref.ref(gradient))
        return gradient

    monkeypatch.setattr(gathering, "weight_gradient", watched)
    gather(model, linears(model), padded("llama"), "gradient", ("row", "column"))
    assert len(alive) == 3 * len(linears(model))


@pytest.mark.parametrize(
    ("batches", "strategy", "message"),
    [
        ([], "wanda_max", "selection 'wanda_max' needs data, but there is no calibration batch"),
        ([torch.ones(2, 3)], "gradient", "calibration batch 1 is a Tensor; it must be a mapping"),
        ([{"input_ids": torch.ones(1, 3, dtype=torch.int64)}], "fisher", "gives no loss .* add 'labels'"),
    ],
)
def test_bad_batches_are_refused(batches, strategy, message):
    model, _ = build("llama")
    with pytest.raises(UserError, match=message):
        gather(model, linears(model), batches, strategy)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["wanda_max", "gradient", "fisher"])
def test_a_gpu_gives_the_same_scores_every_time_and_those_of_the_cpu_up_to_rounding(strategy):
    model, _ = build("llama")
    batches = padded("llama")

    def scores():
        gathered = gather(model, linears(model), batches, strategy)
        return {name: row_scores(gathered[name], layer) for name, layer in linears(model).items()}

    on_cpu = scores()
    model.cuda()
    once, again = scores(), scores()
    for name, expected in on_cpu.items():
        assert torch.equal(once[name], again[name])
        torch.testing.assert_close(once[name].cpu(), expected, rtol=1e-3, atol=1e-6)
