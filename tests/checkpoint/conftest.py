"""Checkpoints that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.checkpoint.disk import step_directory
from tests.checkpoint.victim import write
from tests.ranks import run_threads


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    """Two whole steps that three ranks wrote."""
    with TemporaryDirectory() as name:
        run_threads(3, write, Path(name))
        yield Path(name)


@pytest.fixture
def step(pristine: Path, tmp_path: Path) -> Path:
    """The later step, in a copy that may be damaged."""
    return step_directory(Path(shutil.copytree(pristine, tmp_path / "copy")), 2)
