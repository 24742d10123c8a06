"""Multinomial logistic regression in the Hilbert space of a kernel: what training becomes where gradients do not change.

    min over f in H of  sum_i L(f0(x_i) + f(x_i), y_i) + lambda / 2 ||f||^2_H

(equation 6 of the RoCoFT paper, arXiv:2410.10075, for any number of classes). f = K alpha, and at the minimum
lambda alpha = Y - P: the labels, one-hot, less the probabilities. The problem is solved in coordinates in which H is a plain
Euclidean space, by Newton's method. There is no intercept: H has it, or has it not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from turnrow.errors import UserError

__all__ = ["KernelLogisticRegression"]


class KernelLogisticRegression(ClassifierMixin, BaseEstimator):
    """Kernel logistic regression as a scikit-learn classifier.

    Args:
        kernel: "precomputed", or what `sklearn.metrics.pairwise.pairwise_kernels` takes, such as "linear", "rbf" or a function of
            two samples. A precomputed kernel is (n, n), the same for each class and none between classes, or (n, n, C, C) as
            `tangent_kernels` gives it: that of C outputs, output c being the logit of the c-th class in sorted order, or,
            with C = 1 and two classes, that of the second class over the first.
        lam: lambda, or "cv" to choose it from `lams` by cross-validation.
        lams: to choose from, as multiples of the mean of the kernel's diagonal.
        cv: folds, stratified; fewer where a class has fewer samples.
        scoring: what the folds are compared by: "log_loss", or "accuracy" and, of equally good ones, the larger lambda.
        max_iter: most steps of Newton's method.
        tol: it ends when no component of the gradient is larger, relative to the largest possible at the start.
        random_state: of the folds.

    With the same kernel for each class and two classes there is one function, whose sign decides, as in scikit-learn's
    LogisticRegression; with more classes there is one for each.

    Example:
        >>> kernel = np.array([[2.0, -1.0], [-1.0, 2.0]])
        >>> KernelLogisticRegression().fit(kernel, ["no", "yes"]).predict(kernel).tolist()
        ['no', 'yes']
    """

    def __init__(
        self,
        kernel: str | Callable[..., float] = "precomputed",
        lam: float | Literal["cv"] = 1.0,
        lams: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        cv: int = 5,
        scoring: Literal["log_loss", "accuracy"] = "log_loss",
        max_iter: int = 100,
        tol: float = 1e-12,
        random_state: int | None = 0,
    ) -> None:
        self.kernel = kernel
        self.lam = lam
        self.lams = lams
        self.cv = cv
        self.scoring = scoring
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """A precomputed kernel is sliced along both sides when data are split."""
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def fit(self, X: Any, y: Any, offset: Any = None) -> KernelLogisticRegression:
        """Fit to samples X (n, features) and labels y (n,), or to their kernel.

        Args:
            X: samples, or a precomputed kernel as above.
            y: labels.
            offset: f0 of the samples, (n, classes), such as the outputs of a pretrained model; for two classes with one function
                (n,). None: 0.

        Raises:
            UserError: shapes, lambda or the number of classes do not fit.
        """
        kernel, y = self._training_kernel(X, y)
        check_classification_targets(y)
        encoder = LabelEncoder().fit(y)
        self.classes_ = encoder.classes_
        count = len(self.classes_)
        if count < 2:
            raise UserError(
                f"y holds one class, {self.classes_.tolist()[0]!r}; a classifier needs samples of two at least"
            )
        blocks = _as_blocks(kernel, count)
        outputs = blocks.outputs
        if outputs not in (1, count) or (outputs == 1 and count > 2):
            raise UserError(
                f"the kernel is of {outputs} outputs, but y holds {count} classes; it needs an output for each"
            )
        labels = encoder.transform(y)
        target = np.eye(count)[labels] if outputs > 1 else labels[:, None].astype(float)
        start = _offset(offset, target.shape)
        if self.lam == "cv":
            self._choose(blocks, target, start, labels)
        else:
            self.lam_ = _positive(self.lam)
        coordinates = blocks.coordinates()
        solution, self.n_iter_ = _newton(coordinates, target, start, self.lam_, self.max_iter, self.tol, None)
        f = start + coordinates.apply(solution)
        self.dual_coef_ = (target - _probabilities(f)) / self.lam_
        """alpha, (n, functions)."""
        return self

    def decision_function(self, X: Any, offset: Any = None) -> np.ndarray:
        """f0 + f of samples, or of their kernel with the training samples: (m, classes), for two classes with one function (m,)."""
        check_is_fitted(self)
        f = _applied(self._kernel_with(X), self.dual_coef_, len(self.classes_))
        f = f + _offset(offset, f.shape)
        if len(self.classes_) > 2:
            return f
        return f[:, 1] - f[:, 0] if f.shape[1] == 2 else f[:, 0]

    def predict_proba(self, X: Any, offset: Any = None) -> np.ndarray:
        """Probabilities, (m, classes)."""
        f = self.decision_function(X, offset)
        p = _probabilities(f if f.ndim == 2 else f[:, None])
        return p if p.shape[1] > 1 else np.hstack([1 - p, p])

    def predict(self, X: Any, offset: Any = None) -> np.ndarray:
        """The most probable class of each sample."""
        f = self.decision_function(X, offset)
        return self.classes_[f.argmax(1) if f.ndim == 2 else (f > 0).astype(int)]

    # --- kernels ---------------------------------------------------------------------------------------------------------

    def _training_kernel(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        if self.kernel == "precomputed" and getattr(X, "ndim", 2) == 4:
            X = check_array(X, allow_nd=True, dtype=np.float64)
            y = check_array(y, ensure_2d=False, dtype=None)
            if X.shape[0] != X.shape[1] or X.shape[2] != X.shape[3] or len(y) != len(X):
                raise UserError(
                    f"the kernel is of shape {X.shape} for {len(y)} labels; it must be (n, n, C, C) for n labels"
                )
            self.n_features_in_ = X.shape[1]
            return X, y
        X, y = validate_data(self, X, y, dtype=np.float64)
        if self.kernel == "precomputed":
            if X.shape[0] != X.shape[1]:
                raise UserError(
                    f"the kernel is of shape {X.shape}; a precomputed kernel must be a square matrix (n, n)"
                )
            return X, y
        self.X_fit_ = X
        return pairwise_kernels(X, metric=self.kernel), y

    def _kernel_with(self, X: Any) -> np.ndarray:
        if self.kernel == "precomputed" and getattr(X, "ndim", 2) == 4:
            X = check_array(X, allow_nd=True, dtype=np.float64)
            expected = (self.n_features_in_, self.dual_coef_.shape[1], self.dual_coef_.shape[1])
            if X.shape[1:] != expected:
                raise UserError(
                    f"the kernel is of shape {X.shape}; with the training samples it must be (m, {', '.join(map(str, expected))})"
                )
            return X
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X if self.kernel == "precomputed" else pairwise_kernels(X, self.X_fit_, metric=self.kernel)

    # --- lambda ----------------------------------------------------------------------------------------------------------

    def _choose(self, blocks: _Blocks, target: np.ndarray, start: np.ndarray, labels: np.ndarray) -> None:
        """The lambda with the best mean score over the folds; from the largest on, each solution starts the next."""
        if self.scoring not in ("log_loss", "accuracy"):
            raise UserError(f"scoring is {self.scoring!r}; it must be 'log_loss' or 'accuracy'")
        folds = min(self.cv, int(np.bincount(labels).min()))
        if folds < 2:
            raise UserError("lam is 'cv', but a class has a single sample; give a number, or two samples of each class")
        scale = blocks.mean_diagonal()
        candidates = sorted((float(one) * scale for one in self.lams), reverse=True)
        if not candidates or not candidates[-1] > 0:
            raise UserError(f"lams is {self.lams!r}; it must hold positive numbers, and the kernel must not be zero")
        scores = np.zeros((folds, len(candidates)))
        splitter = StratifiedKFold(folds, shuffle=True, random_state=self.random_state)
        for fold, (kept, held) in enumerate(splitter.split(labels, labels)):
            part = blocks.among(kept, kept)
            coordinates = part.coordinates()
            solution: np.ndarray | None = None
            for number, lam in enumerate(candidates):
                solution, _ = _newton(coordinates, target[kept], start[kept], lam, self.max_iter, self.tol, solution)
                p = _probabilities(start[kept] + coordinates.apply(solution))
                across = blocks.among(held, kept)
                f = start[held] + across.times((target[kept] - p) / lam)
                scores[fold, number] = _score(f, target[held], self.scoring)
        self.cv_results_ = {
            "lam": candidates,
            "mean_score": scores.mean(0).tolist(),
            "std_score": scores.std(0).tolist(),
        }
        self.lam_ = candidates[int(scores.mean(0).argmax())]


class _Blocks:
    """A kernel of one function, or of several that are alike and independent, or of several together."""

    def __init__(self, values: np.ndarray, outputs: int) -> None:
        self.values = values
        """(m, n), or (m, n, C, C)."""
        self.outputs = outputs

    def among(self, first: np.ndarray, second: np.ndarray) -> _Blocks:
        return _Blocks(self.values[np.ix_(first, second)], self.outputs)

    def mean_diagonal(self) -> float:
        diagonal = np.einsum("ii...->i...", self.values)
        return float(diagonal.mean() if diagonal.ndim == 1 else np.einsum("icc->ic", diagonal).mean())

    def times(self, alpha: np.ndarray) -> np.ndarray:
        """K alpha, (m, functions)."""
        if self.values.ndim == 2:
            return self.values @ alpha
        m, n, c, _ = self.values.shape
        return (self.values.transpose(0, 2, 1, 3).reshape(m * c, n * c) @ alpha.ravel()).reshape(m, c)

    def coordinates(self) -> _Coordinates:
        """Phi with Phi Phi^T = K."""
        matrix = self.values
        if matrix.ndim == 4:
            n, _, c, _ = matrix.shape
            matrix = matrix.transpose(0, 2, 1, 3).reshape(n * c, n * c)
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        kept = values > max(values[-1], 0.0) * len(values) * np.finfo(float).eps
        phi = vectors[:, kept] * np.sqrt(values[kept])
        return _Coordinates(phi, self.outputs, together=self.values.ndim == 4)


class _Coordinates:
    """f = Phi w, with w of the norm of f."""

    def __init__(self, phi: np.ndarray, outputs: int, *, together: bool) -> None:
        self.phi, self.outputs, self.together = phi, outputs, together
        self.size = phi.shape[1] if together else phi.shape[1] * outputs

    def apply(self, w: np.ndarray) -> np.ndarray:
        """(n, functions)."""
        if self.together:
            return (self.phi @ w).reshape(-1, self.outputs)
        return self.phi @ w.reshape(-1, self.outputs)

    def gradient(self, residual: np.ndarray) -> np.ndarray:
        """Phi^T residual, (size,)."""
        return (self.phi.T @ (residual.ravel() if self.together else residual)).ravel()

    def curvature(self, w: np.ndarray) -> np.ndarray:
        """Phi^T W Phi for W (n, C, C), one block a sample: (size, size)."""
        n, c = len(w), self.outputs
        if self.together:
            phi = self.phi.reshape(n, c, -1)
            return self.phi.T @ (w @ phi).reshape(n * c, -1)
        r = self.phi.shape[1]
        found = np.empty((r, c, r, c))
        for first in range(c):
            for second in range(first + 1):
                found[:, first, :, second] = self.phi.T @ (w[:, first, second, None] * self.phi)
                found[:, second, :, first] = found[:, first, :, second]
        return found.reshape(r * c, r * c)


def _newton(
    coordinates: _Coordinates,
    target: np.ndarray,
    start: np.ndarray,
    lam: float,
    max_iter: int,
    tol: float,
    w: np.ndarray | None,
) -> tuple[np.ndarray, int]:
    """The minimum over w, and how many steps it took."""
    w = np.zeros(coordinates.size) if w is None else w
    if coordinates.size == 0:
        return w, 1
    largest = max(float(np.abs(coordinates.phi).sum(0).max()), np.finfo(float).tiny)
    f = start + coordinates.apply(w)
    loss = _loss(f, target) + lam / 2 * float(w @ w)

    def step_to(step: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        tried = w - step
        new_f = start + coordinates.apply(tried)
        return tried, new_f, _loss(new_f, target) + lam / 2 * float(tried @ tried)

    for step in range(1, max_iter + 1):
        p = _probabilities(f)
        gradient = coordinates.gradient(p - target) + lam * w
        if np.abs(gradient).max() <= tol * largest:
            return w, step
        hessian = coordinates.curvature(_second_derivatives(p))
        hessian[np.diag_indices_from(hessian)] += lam
        direction = cho_solve(cho_factor(hessian, check_finite=False), gradient, check_finite=False)
        slope, length = float(gradient @ direction), 1.0
        tried, new_f, new_loss = step_to(direction)
        # So near to the minimum the loss no longer tells a step's effect from rounding, and whole steps are right.
        while slope > 1e-8 * max(1.0, abs(loss)) and new_loss > loss - 1e-4 * length * slope and length > 1e-10:
            length /= 2
            tried, new_f, new_loss = step_to(length * direction)
        w, f, loss = tried, new_f, new_loss
    return w, max_iter


def _loss(f: np.ndarray, target: np.ndarray) -> float:
    if f.shape[1] == 1:
        return float(np.logaddexp(0, f).sum() - (target * f).sum())
    return float(-(target * log_softmax(f, axis=1)).sum())


def _probabilities(f: np.ndarray) -> np.ndarray:
    """(n, functions)."""
    if f.shape[1] == 1:
        return np.exp(-np.logaddexp(0, -f))
    return np.exp(log_softmax(f, axis=1))


def _second_derivatives(p: np.ndarray) -> np.ndarray:
    """Of the loss of each sample, (n, C, C)."""
    if p.shape[1] == 1:
        return (p * (1 - p))[:, :, None]
    return np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - p[:, :, None] * p[:, None, :]


def _score(f: np.ndarray, target: np.ndarray, scoring: str) -> float:
    if scoring == "log_loss":
        return -_loss(f, target) / len(f)
    if f.shape[1] == 1:
        return float(((f > 0) == (target > 0.5)).mean())
    return float((f.argmax(1) == target.argmax(1)).mean())


def _positive(lam: Any) -> float:
    if not isinstance(lam, (int, float)) or not lam > 0:
        raise UserError(f"lam is {lam!r}; it must be a positive number, or 'cv'")
    return float(lam)


def _as_blocks(kernel: np.ndarray, classes: int) -> _Blocks:
    if kernel.ndim == 4:
        return _Blocks(kernel, kernel.shape[2]) if kernel.shape[2] > 1 else _Blocks(kernel[..., 0, 0], 1)
    return _Blocks(kernel, 1 if classes == 2 else classes)


def _applied(kernel: np.ndarray, alpha: np.ndarray, classes: int) -> np.ndarray:
    return _as_blocks(kernel, classes).times(alpha)


def _offset(offset: Any, shape: tuple[int, ...]) -> np.ndarray:
    if offset is None:
        return np.zeros(shape)
    values = np.asarray(offset, dtype=float)
    values = values[:, None] if values.ndim == 1 else values
    if values.shape != shape:
        raise UserError(
            f"offset is of shape {np.shape(offset)}; it must be {shape}, a number for each sample and function"
        )
    return values
