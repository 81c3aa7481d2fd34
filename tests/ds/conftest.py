"""Two process pools for the folder: worlds 2 and 4, since DeepSpeed's groups are those of the whole world."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.ranks import RankPool

if importlib.util.find_spec("deepspeed") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def ds2() -> Iterator[RankPool]:
    """Two processes for DeepSpeed engines."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ds4() -> Iterator[RankPool]:
    """Four processes for DeepSpeed engines."""
    pool = RankPool(4)
    yield pool
    pool.close()
