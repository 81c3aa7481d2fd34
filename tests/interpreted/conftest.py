"""Kernels in Triton's interpreter, in a process of their own: tests/house/test_interpreted_suite.py starts it.

``@triton.jit`` reads TRITON_INTERPRET when it decorates, and a kernel decorated for the interpreter is never compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    """The repaired interpreter, and memory that holds NaN until it is written."""
    from tests.interpreted.interpreter import repaired

    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, its default
    try:
        with repaired():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
