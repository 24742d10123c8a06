"""The measuring functions count what they say they count, on graphs small enough to add up by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import adamw_state_bytes, held_bytes, interleaved_seconds, peak_bytes, saved_bytes

ROWS, WIDTH = 8, 16
ACTIVATION = ROWS * WIDTH * 4  # bytes in float32
WEIGHT = WIDTH * WIDTH * 4
SCALAR = 4


class _Hiding(torch.autograd.Function):
    """Multiplies by 2 and keeps a tensor where saved-tensor hooks do not look."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.hidden = x.clone()
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


def _frozen_linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)


def _input() -> Tensor:
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def test_saved_bytes_leave_weights_out() -> None:
    linear, x = _frozen_linear(), _input()
    assert saved_bytes(lambda: linear(x).sum(), linear) == 0


def test_saved_bytes_count_a_storage_once_however_often_it_is_saved() -> None:
    linear, x = _frozen_linear(), _input()
    # relu saves its result, the product saves it twice more.
    assert saved_bytes(lambda: (lambda y: (y * y).sum())(linear(x).relu()), linear) == ACTIVATION


def test_saved_bytes_count_the_whole_storage_of_a_view() -> None:
    linear, x = _frozen_linear(), _input()
    weight = torch.ones(3, requires_grad=True)
    assert saved_bytes(lambda: (linear(x)[0, :3] * weight).sum(), linear) == ACTIVATION + 3 * 4


def test_held_bytes_see_what_a_function_hides_from_the_hooks() -> None:
    linear, x = _frozen_linear(), _input()

    def forward() -> Tensor:
        return _Hiding.apply(x).sum()

    assert saved_bytes(forward, linear) == 0
    assert held_bytes(forward) == ACTIVATION + SCALAR


def test_peak_bytes_see_a_full_weight_gradient() -> None:
    linear = nn.Linear(512, 512, bias=False)
    x = torch.randn(1, 512)

    def step() -> None:
        linear.weight.grad = None
        linear(x).sum().backward()

    trained = peak_bytes(step)
    linear.requires_grad_(False)
    x.requires_grad_(True)
    assert trained >= linear.weight.nbytes > 10 * peak_bytes(lambda: linear(x).sum().backward())


def test_peak_bytes_forget_what_was_freed() -> None:
    def one_after_another() -> None:
        for _ in range(10):
            torch.ones(ROWS, WIDTH)

    assert peak_bytes(one_after_another) == ACTIVATION
    assert peak_bytes(lambda: [torch.ones(ROWS, WIDTH) for _ in range(10)]) == 10 * ACTIVATION


def test_peak_bytes_ignore_views_of_what_was_there() -> None:
    x = torch.ones(ROWS, WIDTH)
    assert peak_bytes(lambda: x.t()[1:].add_(1)) == 0


@pytest.mark.filterwarnings("ignore:Sparse .* beta state")
@pytest.mark.parametrize(
    ("layout", "values", "indices"),
    [
        (torch.sparse_coo, 2, 2 * 2),
        (torch.sparse_csr, 2, 5 + 2),
        (torch.sparse_csc, 2, 5 + 2),
        (torch.sparse_bsr, 4, 3 + 1),
        (torch.sparse_bsc, 4, 3 + 1),
    ],
    ids=str,
)
def test_peak_bytes_count_the_values_and_indices_of_a_sparse_tensor(
    layout: torch.layout, values: int, indices: int
) -> None:
    dense = torch.zeros(4, 4)
    dense[0, 1] = dense[1, 0] = 1.0
    sparse = dense.to_sparse(
        layout=layout, blocksize=(2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    )
    assert peak_bytes(sparse.clone) == 4 * values + 8 * indices


def test_adamw_keeps_two_moments_and_a_step_count_per_parameter() -> None:
    parameters = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    assert adamw_state_bytes(parameters) == 2 * (12 + 5) * 4 + 2 * SCALAR
    assert all(parameter.grad is None for parameter in parameters)


def test_adamw_state_of_nothing_is_nothing() -> None:
    assert adamw_state_bytes([]) == 0


def test_every_step_runs_once_a_round_in_an_order_that_the_seed_decides() -> None:
    def order(seed: int) -> list[str]:
        ran: list[str] = []
        steps = {name: (lambda name=name: ran.append(name)) for name in "abcd"}
        seconds = interleaved_seconds(steps, rounds=5, device="cpu", seed=seed)
        assert {name: len(samples) for name, samples in seconds.items()} == dict.fromkeys("abcd", 5)
        return ran

    first = order(seed=0)
    assert first == order(seed=0)
    rounds = [first[i : i + 4] for i in range(0, 20, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
