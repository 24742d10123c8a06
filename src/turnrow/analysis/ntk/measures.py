"""How far kernels are from one another and from the labels, and how many directions they have.

Kernels are matrices (n, n) or, of C outputs, (n, n, C, C), or a `TangentKernel`, of which the training part is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnrow.analysis.ntk.kernels import TangentKernel
from turnrow.errors import UserError

__all__ = [
    "Movement",
    "alignment",
    "class_mean",
    "effective_dimension",
    "label_alignment",
    "movement",
    "relative_distance",
    "spectrum",
]

Kernel = np.ndarray | TangentKernel


def relative_distance(kernel: Kernel, reference: Kernel, p: int = 2) -> float:
    """|| K / ||K||_p - K_ref / ||K_ref||_p ||_p over all entries, p = 1 or 2: 0 for multiples of one another, 2 at most.

    The measure of tables 5 and 13 of the RoCoFT paper (arXiv:2410.10075, section 5). Its authors' kernels have the scale of
    their parameter counts; only the shape is compared.

    Raises:
        UserError: the kernels differ in shape, one is zero, or p is neither 1 nor 2.
    """
    if p not in (1, 2):
        raise UserError(f"p is {p}; it must be 1 or 2")
    first, second = _flat(kernel), _flat(reference)
    _check_same(first, second)
    return float(_norm(first / _size(first, p) - second / _size(second, p), p))


def alignment(kernel: Kernel, other: Kernel) -> float:
    """Centered kernel alignment (Cortes et al., 2012, arXiv:1203.0550): 1 for kernels that are multiples of one another but for a shift.

    Of several outputs the mean over the classes is taken, see `class_mean`.
    """
    first, second = _centered(class_mean(kernel)), _centered(class_mean(other))
    _check_same(first, second)
    return float((first * second).sum() / (_size(first, 2) * _size(second, 2)))


def label_alignment(kernel: Kernel, labels: Sequence[Any] | np.ndarray) -> float:
    """Centered alignment with the kernel of the labels, 1 for samples of the same class and 0 for others."""
    values = np.asarray(labels)
    matrix = class_mean(kernel)
    if values.shape != (len(matrix),):
        raise UserError(f"labels are of shape {values.shape}; there are {len(matrix)} samples")
    if len(np.unique(values)) < 2:
        raise UserError("labels hold one class; alignment needs two at least")
    return alignment(matrix, (values[:, None] == values).astype(float))


def spectrum(kernel: Kernel) -> np.ndarray:
    """Eigenvalues, largest first; (n C,) of several outputs."""
    return np.linalg.eigvalsh(_flat(kernel))[::-1]


def effective_dimension(kernel: Kernel, lam: float) -> float:
    """trace K (K + lambda)^-1: how many directions regression with this lambda makes use of (degrees of freedom)."""
    if not lam > 0:
        raise UserError(f"lam is {lam}; it must be a positive number")
    values = np.clip(spectrum(kernel), 0, None)
    return float((values / (values + lam)).sum())


@dataclass(frozen=True)
class Movement:
    """How far a kernel has moved: near 0, training was lazy, and the kernel at the start explains it."""

    change: float
    """||K - K0|| / ||K0||, Frobenius."""
    shape: float
    """Relative distance, p = 2: without what is mere growth."""
    alignment: float
    """Centered alignment with K0."""
    growth: float
    """trace K / trace K0."""


def movement(start: Kernel, later: Mapping[str, Kernel]) -> dict[str, Movement]:
    """Compare kernels at moments of training, such as checkpoints, with the one at the start, on the same samples and outputs."""
    first = _flat(start)
    found: dict[str, Movement] = {}
    for name, kernel in later.items():
        second = _flat(kernel)
        _check_same(first, second)
        found[name] = Movement(
            change=float(_norm(second - first, 2) / _size(first, 2)),
            shape=relative_distance(second, first),
            alignment=alignment(kernel, start),
            growth=float(np.trace(second) / np.trace(first)),
        )
    return found


def class_mean(kernel: Kernel) -> np.ndarray:
    """(n, n): of several outputs the mean of the kernels of each class with itself."""
    values = kernel.train if isinstance(kernel, TangentKernel) else np.asarray(kernel, dtype=float)
    return np.einsum("ijcc->ij", values) / values.shape[2] if values.ndim == 4 else values


def _flat(kernel: Kernel) -> np.ndarray:
    values = kernel.train if isinstance(kernel, TangentKernel) else np.asarray(kernel, dtype=float)
    if values.ndim == 4:
        n, m, c, d = values.shape
        values = values.transpose(0, 2, 1, 3).reshape(n * c, m * d)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise UserError(f"a kernel is of shape {np.shape(values)}; it must be (n, n) or (n, n, C, C)")
    return values


def _check_same(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise UserError(
            f"the kernels are of {first.shape} and {second.shape}; they must be of the same samples and outputs"
        )


def _centered(matrix: np.ndarray) -> np.ndarray:
    return matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean()


def _norm(matrix: np.ndarray, p: int) -> float:
    return float(np.abs(matrix).sum() if p == 1 else np.sqrt(np.square(matrix).sum()))


def _size(matrix: np.ndarray, p: int) -> float:
    size = _norm(matrix, p)
    if size == 0:
        raise UserError("a kernel is zero; nothing can be said of its shape")
    return size
