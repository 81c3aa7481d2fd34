"""The Triton kernels in Triton's interpreter, which a process chooses before it first sees a kernel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.report import measured

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "tests" / "interpreted"
# Every test file of the folder, and how many tests it has at least.
SUITE = {
    "test_add_product.py": 115,
    "test_grids.py": 135,
    "test_guard_pages.py": 60,
    "test_harness.py": 24,
    "test_momentum_cast.py": 150,
    "test_optimizer.py": 9,
    "test_refusals.py": 40,
    "test_symmetric_product.py": 170,
}


@pytest.mark.fault("F17")
@pytest.mark.parametrize(("name", "at_least"), SUITE.items(), ids=SUITE)
def test_kernels_in_the_interpreter(name: str, at_least: int, tmp_path: Path, figure: Callable[[str], None]) -> None:
    figures = tmp_path / "figures.json"
    options = ["-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", f"--fault-report={figures}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER / name)],
        cwd=REPO,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    # Nothing but "passed": a skipped or expected failure would stand in the same line.
    summary = re.findall(r"^(\d+) passed(?:, \d+ warnings?)? in ", done.stdout, re.MULTILINE)
    assert len(summary) == 1, report
    figure(f"{name}: {summary[0]} tests of the Triton kernels passed in the interpreter, 0 skipped")
    assert int(summary[0]) >= at_least, report
    for line in measured(json.loads(figures.read_text())["tests"]):
        figure(line.removeprefix("- ").split(": `")[0])
