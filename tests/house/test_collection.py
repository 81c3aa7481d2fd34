"""`make test` runs every test file there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house.test_interpreted_suite import FOLDER, SUITE

TESTS = Path(__file__).parents[1]


def test_no_folder_is_left_out(pytestconfig: pytest.Config) -> None:
    """pytest skips folders with some names, among them "dist" and "build", without a word."""
    skipped = set(pytestconfig.getini("norecursedirs"))
    folders = {part for path in TESTS.rglob("test_*.py") for part in path.relative_to(TESTS).parts[:-1]}
    assert folders
    assert not folders & skipped


def test_every_file_that_a_folder_leaves_out_runs_in_another_process() -> None:
    """A conftest.py can leave files out, too: each file of the interpreted suite is started by another test."""
    ignoring = {path.parent for path in TESTS.rglob("conftest.py") if "collect_ignore" in path.read_text()}
    # The other one does so only where DeepSpeed is not installed.
    assert ignoring == {FOLDER, TESTS / "ds"}
    assert set(SUITE) == {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("test_*.py")}
