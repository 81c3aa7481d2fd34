"""Fixtures shared by all tests: fixed seeds, one thread per rank, one process pool, a time limit each."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.ranks import RankPool

TIME_LIMIT_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test without a time limit of its own the common one."""
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIME_LIMIT_S))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The only process pool of the session: four gloo processes that serve worlds 1 to 4."""
    shared = RankPool(4)
    yield shared
    shared.close()
