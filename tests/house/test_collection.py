"""`make test` runs every test file there is."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_no_folder_is_left_out(pytestconfig: pytest.Config) -> None:
    """pytest skips folders with some names, among them "dist" and "build", without a word."""
    skipped = set(pytestconfig.getini("norecursedirs"))
    folders = {part for path in TESTS.rglob("test_*.py") for part in path.relative_to(TESTS).parts[:-1]}
    assert folders
    assert not folders & skipped
