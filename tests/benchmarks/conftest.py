"""What the tests of the benchmarks share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_collections():
    """The benchmarks collect garbage before every step: not what the libraries brought, a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
