"""Kernel logistic regression against scikit-learn's own, and as a scikit-learn estimator."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from turnrow.analysis.ntk import KernelLogisticRegression
from turnrow.errors import UserError

# This check hands raw samples, (80, 2), to an estimator that takes a square kernel.
NOT_FOR_PRECOMPUTED = {"check_decision_proba_consistency": "gives samples instead of a kernel"}


def samples(classes: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    return make_classification(n, 8, n_informative=5, n_classes=classes, random_state=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("lam", [0.01, 1.0, 100.0])
def test_a_linear_kernel_is_logistic_regression(classes: int, lam: float) -> None:
    x, y = samples(classes)
    solver = "newton-cholesky" if classes == 2 else "newton-cg"
    theirs = LogisticRegression(C=1 / lam, fit_intercept=False, tol=1e-10, max_iter=1000, solver=solver).fit(x, y)
    ours = KernelLogisticRegression(kernel="linear", lam=lam).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(x[:7] + 1), theirs.predict_proba(x[:7] + 1), atol=1e-6)
    # The weights of the linear model are X^T alpha.
    np.testing.assert_allclose((x.T @ ours.dual_coef_).T, theirs.coef_, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_precomputed_kernel_is_the_kernel(classes: int) -> None:
    x, y = samples(classes)
    linear = KernelLogisticRegression(kernel="linear").fit(x, y)
    given = KernelLogisticRegression().fit(x @ x.T, y)
    np.testing.assert_allclose(given.decision_function(x[:5] @ x.T), linear.decision_function(x[:5]))


def test_a_kernel_of_several_outputs_with_none_between_them_is_one_for_each_class() -> None:
    x, y = samples(3)
    k = x @ x.T
    blocks = np.einsum("ij,cd->ijcd", k, np.eye(3))
    one, several = KernelLogisticRegression(lam=0.3).fit(k, y), KernelLogisticRegression(lam=0.3).fit(blocks, y)
    np.testing.assert_allclose(several.predict_proba(blocks[:9]), one.predict_proba(k[:9]), atol=1e-8)
    np.testing.assert_allclose(several.dual_coef_, one.dual_coef_, atol=1e-7)


def random_blocks(n: int, c: int) -> np.ndarray:
    """A positive semi-definite kernel (n, n, c, c) of few directions."""
    j = np.random.default_rng(0).normal(size=(n, c, 12))
    return np.einsum("icp,jdp->ijcd", j, j)


@pytest.mark.parametrize("with_offset", [False, True])
def test_the_solution_is_the_minimum(with_offset: bool) -> None:
    n, c, lam = 20, 3, 0.5
    k, y = random_blocks(n, c), np.arange(n) % c
    f0 = np.random.default_rng(1).normal(size=(n, c)) if with_offset else np.zeros((n, c))
    flat = k.transpose(0, 2, 1, 3).reshape(n * c, n * c)

    def objective(alpha: np.ndarray) -> float:
        f = f0 + (flat @ alpha).reshape(n, c)
        return -log_softmax(f, axis=1)[np.arange(n), y].sum() + lam / 2 * alpha @ flat @ alpha

    found = KernelLogisticRegression(lam=lam).fit(k, y, offset=f0)
    at = objective(found.dual_coef_.ravel())
    slow = minimize(
        objective, np.zeros(n * c), method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 10**6, "ftol": 1e-15}
    )
    assert at <= slow.fun + 1e-6
    np.testing.assert_allclose(at, slow.fun, rtol=1e-4)
    f = found.decision_function(k, offset=f0)
    np.testing.assert_allclose(f, f0 + (flat @ found.dual_coef_.ravel()).reshape(n, c), atol=1e-9)


def test_a_strong_penalty_leaves_the_offset() -> None:
    k, y = random_blocks(12, 2), np.arange(12) % 2
    f0 = np.random.default_rng(1).normal(size=(12, 2))
    found = KernelLogisticRegression(lam=1e9).fit(k, y, offset=f0)
    np.testing.assert_array_equal(found.predict(k, offset=f0), f0.argmax(1))


def test_lambda_is_chosen_by_cross_validation() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 30))
    y = (x[:, 0] + 0.7 * rng.normal(size=60) > 0).astype(int)  # one direction of thirty tells something
    found = KernelLogisticRegression(kernel="linear", lam="cv").fit(x, y)
    scores = found.cv_results_["mean_score"]
    assert found.lam_ == found.cv_results_["lam"][int(np.argmax(scores))]
    assert found.lam_ > min(found.cv_results_["lam"])  # the weakest penalty is not the best
    # The same folds by hand.
    best = KernelLogisticRegression(kernel="linear", lam=found.lam_).fit(x, y)
    np.testing.assert_allclose(best.predict_proba(x), found.predict_proba(x), atol=1e-7)


def test_scikit_learn_splits_kernels_of_several_outputs() -> None:
    k, y = random_blocks(24, 3), np.arange(24) % 3
    assert cross_val_score(KernelLogisticRegression(), k, y, cv=3).shape == (3,)
    search = GridSearchCV(KernelLogisticRegression(), {"lam": [0.1, 10.0]}, cv=3).fit(k, y)
    assert search.best_params_["lam"] in (0.1, 10.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernel", ["linear", "precomputed"])
def test_it_is_a_scikit_learn_estimator(kernel: str) -> None:
    excluded = NOT_FOR_PRECOMPUTED if kernel == "precomputed" else {}
    results = check_estimator(KernelLogisticRegression(kernel=kernel), expected_failed_checks=excluded, on_skip=None)
    assert {one["check_name"] for one in results if one["status"] == "xfail"} == set(excluded)


@pytest.mark.parametrize(
    ("settings", "kernel", "y", "message"),
    [
        ({"lam": 0}, np.eye(4), [0, 0, 1, 1], "lam is 0; it must be a positive number, or 'cv'"),
        ({"lam": "cv", "scoring": "f1"}, np.eye(4), [0, 0, 1, 1], "scoring is 'f1'"),
        ({"lam": "cv"}, np.eye(3), [0, 1, 1], "a class has a single sample"),
        ({}, np.eye(3), [1, 1, 1], "y holds one class, 1"),
        ({}, np.ones((3, 4)), [0, 1, 1], "must be a square matrix"),
        ({}, random_blocks(6, 2), [0, 1, 2, 0, 1, 2], "is of 2 outputs, but y holds 3 classes"),
        ({}, random_blocks(6, 2), [0, 1, 1], r"must be \(n, n, C, C\) for n labels"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, kernel: np.ndarray, y: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KernelLogisticRegression(**settings).fit(kernel, y)


def test_a_kernel_with_other_training_samples_is_refused() -> None:
    found = KernelLogisticRegression().fit(random_blocks(6, 2), [0, 1] * 3)
    with pytest.raises(UserError, match=r"must be \(m, 6, 2, 2\)"):
        found.predict(random_blocks(5, 2))
    with pytest.raises(UserError, match=r"offset is of shape \(6, 3\); it must be \(6, 2\)"):
        found.predict(random_blocks(6, 2), offset=np.zeros((6, 3)))
