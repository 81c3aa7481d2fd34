"""Fixtures shared by all tests: fixed seeds, one thread per rank, one process pool."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.ranks import RankPool

pytest_plugins = ["tests.faults.plugin"]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    # A test, or the product under it, that left another precision behind would change what later tests compute.
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The only process pool of the session: four gloo processes that serve worlds 1 to 4."""
    shared = RankPool(4)
    yield shared
    shared.close()
