"""The benchmark of tangent kernels: what it compares with computes the same kernels, and its table says what was reached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.ntk import Setting, difference, jacobian_kernel, lm_kernel_ft, markdown
from tests.analysis.ntk.models import SIZES, VOCABULARY, batch
from turnrow.analysis.ntk import CentroidHead, Full, TangentKernel, tangent_kernels


@pytest.fixture(scope="module")
def setting() -> Setting:
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=12, attn_implementation="eager", **SIZES)
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).double().eval()
    head = CentroidHead(torch.randn(2, 16, generator=torch.Generator().manual_seed(9)))
    return Setting(model, [batch([5, 2, 4], 1)], [batch([3, 6], 2), batch([4], 3)], head, (3, 3), 2)


@pytest.fixture(scope="module")
def kernel(setting: Setting) -> TangentKernel:
    return tangent_kernels(setting.model, setting.train, {"full": Full()}, setting.head, setting.other)["full"]


@pytest.mark.parametrize("together", [1, 2])
def test_one_jacobian_at_a_time_gives_the_same_kernel(setting: Setting, kernel: TangentKernel, together: int) -> None:
    train, other = jacobian_kernel(setting, together)
    np.testing.assert_allclose(kernel.train, train, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(kernel.other, other, rtol=1e-9, atol=1e-14)


# torch's own forward mode
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (2, 3)])
def test_the_algorithm_of_lm_kernel_ft_gives_the_same_blocks(
    setting: Setting, kernel: TangentKernel, outer: int, inner: int
) -> None:
    run = lm_kernel_ft(setting, outer, inner, most=6, seconds=60)
    for first, second, block in run["blocks"]:
        assert block.shape == (outer, 2, inner, 2)
        assert difference(kernel, 3, first, second, block) < 1e-9
    # All pairs of batches of 3 training samples with batches of all 6, and a jacobian for each of the former.
    outers, inners = (3, 6) if outer == 1 else (2, 2)
    pair, jacrev = (np.mean([one["wall"] for one in run[kind]]) for kind in ("pair_seconds", "jacrev_seconds"))
    assert run["extrapolated_seconds"]["wall"] == pytest.approx(outers * jacrev + outers * inners * pair)


def both(seconds: float) -> dict[str, float]:
    return {"wall": seconds, "processor": 2 * seconds}


def result(ours: float, off: float) -> dict[str, Any]:
    run = {"outer_batch": 1, "inner_batch": 1, "extrapolated_seconds": both(600.0), "relative_difference": off}
    return {
        "machine": {"processor": "some processor", "threads": 1, "load_average": 0.5},
        "versions": {"torch": "2.13"},
        "settings": {
            "train": 32, "test": 200, "classes": 2, "task": "sst2", "model": "a model", "dtype": "float32", "device": "cpu",
            "kernels": ["full", "rows r=1"],
        },
        "figures": {
            "all_seconds": {"wall": ours, "processor": ours}, "all_peak_bytes": 2**30, "single_seconds": {"full": both(8.0), "rows r=1": both(4.0)},
            "jacobian_seconds": {"1": both(40.0), "8": both(20.0)}, "jacobian_relative_difference": 2e-6,
            "lm_kernel_ft": [run, {**run, "inner_batch": 8, "extrapolated_seconds": both(300.0)}],
        },
    }  # fmt: skip


def test_the_table_says_what_was_reached() -> None:
    shown = markdown(result(10.0, 1e-6))
    assert "| 2 kernels in one pass | 10.0 | 10.0 | 1.00 GiB |" in shown
    assert "at batch 1: 60.0 times faster (120.0 by the processor's seconds); at least 50: reached" in shown
    assert "best batch sizes: 30.0 times faster" in shown
    assert "one jacobian at a time: 5.0 times faster (5.0 by the processor's seconds); at least 3: reached" in shown
    assert "multiplied in groups: 2.5 times faster" in shown
    assert "largest relative difference 2.0e-06; at most 1e-4: reached" in shown


def test_a_goal_that_is_missed_is_said() -> None:
    shown = markdown(result(20.0, 1e-3))
    assert "at batch 1: 30.0 times faster (60.0 by the processor's seconds); at least 50: MISSED" in shown
    assert "largest relative difference 1.0e-03; at most 1e-4: MISSED" in shown
