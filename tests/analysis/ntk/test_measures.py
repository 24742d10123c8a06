"""Distances, spectra, dimensions and alignments: values that can be checked by eye, and properties."""

from __future__ import annotations

import numpy as np
import pytest

from turnrow.analysis.ntk import (
    TangentKernel,
    alignment,
    class_mean,
    effective_dimension,
    label_alignment,
    movement,
    relative_distance,
    spectrum,
)
from turnrow.errors import UserError

ONE, TWO = np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 1.0], [1.0, 3.0]])


def test_relative_distance_by_hand() -> None:
    # p = 1: [[1/2, 0], [0, 1/2]] and [[3/8, 1/8], [1/8, 3/8]] are 4/8 apart.
    assert relative_distance(TWO, ONE, p=1) == pytest.approx(0.5)
    # p = 2: 2 / sqrt(8) = 0.7071 and 3, 1 over sqrt(20).
    expected = np.sqrt(2 * (1 / np.sqrt(2) - 3 / np.sqrt(20)) ** 2 + 2 / 20)
    assert relative_distance(TWO, ONE, p=2) == pytest.approx(expected)


@pytest.mark.parametrize("p", [1, 2])
def test_relative_distance_looks_at_the_shape_alone(p: int) -> None:
    assert relative_distance(5 * TWO, TWO, p=p) == pytest.approx(0, abs=1e-15)
    assert relative_distance(-TWO, TWO, p=p) == pytest.approx(2)
    assert relative_distance(TWO, ONE, p=p) == pytest.approx(relative_distance(ONE, TWO, p=p))


def test_relative_distance_of_several_outputs_is_that_of_the_whole_matrix() -> None:
    j = np.random.default_rng(0).normal(size=(2, 4, 3, 5))
    blocks = [np.einsum("icp,jdp->ijcd", one, one) for one in j]
    flat = [k.transpose(0, 2, 1, 3).reshape(12, 12) for k in blocks]
    kernels = [TangentKernel(k, k[:0], 5) for k in blocks]
    for p in (1, 2):
        assert relative_distance(*kernels, p=p) == pytest.approx(relative_distance(*flat, p=p))
    np.testing.assert_allclose(kernels[0].flat, flat[0])


def test_spectrum_and_effective_dimension_by_hand() -> None:
    np.testing.assert_allclose(spectrum(TWO), [4, 2])
    assert effective_dimension(TWO, 2.0) == pytest.approx(4 / 6 + 2 / 4)
    assert effective_dimension(TWO, 1e-12) == pytest.approx(2)


def test_alignment_is_one_for_multiples_and_shifts() -> None:
    k = np.random.default_rng(0).normal(size=(5, 5))
    k = k @ k.T
    assert alignment(k, 3 * k + 7) == pytest.approx(1)
    assert alignment(k, -k) == pytest.approx(-1)


def test_a_kernel_of_the_labels_is_aligned_with_them() -> None:
    labels = ["a", "b", "a", "c"]
    of_labels = (np.array(labels)[:, None] == np.array(labels)).astype(float)
    assert label_alignment(of_labels, labels) == pytest.approx(1)
    assert label_alignment(np.diag([1.0, 2.0, 3.0, 4.0]), labels) < 0.9


def test_the_class_mean_leaves_out_what_is_between_classes() -> None:
    blocks = np.zeros((1, 1, 2, 2))
    blocks[0, 0] = [[1, 9], [9, 3]]
    np.testing.assert_allclose(class_mean(blocks), [[2]])


def test_growth_alone_is_no_change_of_shape() -> None:
    moved = movement(TWO, {"later": 3 * TWO, "start": TWO})
    assert moved["start"].change == 0
    assert moved["later"].change == pytest.approx(2)
    assert moved["later"].shape == pytest.approx(0, abs=1e-12)
    assert moved["later"].growth == pytest.approx(3)
    assert moved["later"].alignment == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_distance(ONE, TWO, p=3), "p is 3; it must be 1 or 2"),
        (lambda: relative_distance(ONE, np.eye(3)), "must be of the same samples and outputs"),
        (lambda: relative_distance(np.zeros((2, 2)), TWO), "a kernel is zero"),
        (lambda: spectrum(np.ones((2, 3))), r"must be \(n, n\)"),
        (lambda: effective_dimension(ONE, 0.0), "lam is 0.0"),
        (lambda: label_alignment(ONE, [0, 1, 1]), "there are 2 samples"),
        (lambda: label_alignment(ONE, [1, 1]), "labels hold one class"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
