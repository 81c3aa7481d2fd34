"""docs/reliability.md is what the measured results say; fault marks, figures and reports work."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import plugin, report

REPO = Path(__file__).resolve().parents[2]
CASES = """
import pytest
@pytest.fixture
def breaks():
    yield
    raise RuntimeError
@pytest.mark.fault("F4", "F25")
@pytest.mark.parametrize("n", [1, 12])
def test_good(figure, n):
    figure(f"{n} of {n} loaded")
    figure("0 hangs")
@pytest.mark.fault("F4")
def test_bad(figure):
    figure("half")
    assert False
@pytest.mark.fault("F5")
def test_breaks(breaks): pass
@pytest.mark.fault("F6")
@pytest.mark.soak
def test_long(): pass
def test_other(): pass
"""


def run(folder: Path, *options: str, cases: str = CASES) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    (folder / "test_cases.py").write_text(cases)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.faults.plugin",
        "-c",
        "/dev/null",
        "--rootdir",
        folder,
    ]
    done = subprocess.run(
        [*command, f"--fault-report={folder / 'out.json'}", "--strict-markers", *options, folder / "test_cases.py"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    path = folder / "out.json"
    return done, json.loads(path.read_text()) if path.is_file() else {"tests": []}


def test_a_run_reports_what_each_test_of_a_fault_measured(tmp_path: Path) -> None:
    done, found = run(tmp_path)
    assert "1 failed, 4 passed, 1 skipped, 1 error" in done.stdout
    rows = {row["test"].split("::")[1]: row for row in found["tests"]}
    assert {name: (row["faults"], row["outcome"], row["figures"]) for name, row in rows.items()} == {
        "test_good[1]": (["F4", "F25"], "passed", ["1 of 1 loaded", "0 hangs"]),
        "test_good[12]": (["F4", "F25"], "passed", ["12 of 12 loaded", "0 hangs"]),
        "test_bad": (["F4"], "failed", ["half"]),
        "test_breaks": (["F5"], "error", []),
        "test_long": (["F6"], "skipped", []),
    }
    assert set(found["environment"]) == {"cores", "python", "system", "torch"}


def test_soak_runs_the_long_ones_and_unknown_faults_are_refused(tmp_path: Path) -> None:
    _, found = run(tmp_path, "--soak", "-k", "test_long")
    assert [row["outcome"] for row in found["tests"]] == ["passed"]
    done, _ = run(tmp_path, cases=CASES.replace("F6", "F99"))
    assert "test_long: F99 is not a fault of table.toml" in done.stdout + done.stderr
    assert done.returncode != 0


def row(faults: list[str], test: str, outcome: str = "passed", figures: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"faults": faults, "test": test, "outcome": outcome, "figures": [*figures], "seconds": 0.0}


def lines(*rows: dict[str, Any]) -> dict[str, str]:
    """The rows of the tables by fault."""
    text = report.lines(rows, plugin.environment())
    return {line.split(" | ")[0].removeprefix("| "): line for line in text if line.startswith("| ")}


def test_the_page_hides_nothing() -> None:
    found = lines(
        row(["F1"], "tests/a.py::test_x[1]"),
        row(["F1", "F2"], "tests/a.py::test_y", "failed"),
        row(["F3"], "tests/a.py::test_z", "skipped"),
        row(["F4"], "tests/a.py::test_z"),
        row(["F4"], "tests/b.py::test_z", "skipped"),
    )
    assert found["F1"].endswith("| **FAILS**: 1 of 2 tests | `tests/a.py`: 1 passed, 1 failed<br>`test_y` |")
    assert found["F2"].endswith("| **FAILS**: 1 of 1 tests | `tests/a.py`: 1 failed<br>`test_y` |")
    assert found["F3"].endswith("| **not run** | `tests/a.py`: 1 skipped |")
    assert found["F4"].endswith(
        "| holds in part: 1 tests skipped | `tests/a.py`: 1 passed<br>`tests/b.py`: 1 skipped |"
    )
    assert found["F5"].endswith("| **no test** | - |")
    assert set(found) - {"|"} == set(plugin.read_table())


def test_figures_of_the_cases_of_a_test_become_ranges() -> None:
    figures = ["3 of 3 ranks raised after 0.25 s", "1,000 of 1,000 ranks raised after 1e-2 s"]
    tests = [row(["F1"], f"tests/a.py::test_x[{number}]", figures=(text,)) for number, text in enumerate(figures)]
    assert list(report.measured([*tests, row(["F1"], "tests/a.py::test_y", figures=("F32 holds.",))])) == [
        "- 3 to 1,000 of 3 to 1,000 ranks raised after 1e-2 to 0.25 s (2 times): `tests/a.py::test_x`",
        "- F32 holds: `tests/a.py::test_y`",
    ]


def test_later_reports_replace_earlier_ones_but_a_skip_does_not(tmp_path: Path) -> None:
    reports = [
        {"environment": {"run": number}, "tests": tests}
        for number, tests in enumerate(
            [
                [row([], "b", "failed"), row([], "a")],
                [row([], "b"), row([], "a", "skipped"), row([], "c", "skipped")],
            ]
        )
    ]
    joined = report.join(reports)
    assert [(test["test"], test["outcome"]) for test in joined["tests"]] == [
        ("a", "passed"),
        ("b", "passed"),
        ("c", "skipped"),
    ]
    assert joined["environment"] == {"run": 1}


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("failed", 1), ("error", 1), ("skipped", 0)])
def test_the_command_writes_results_and_page(outcome: str, status: int, tmp_path: Path) -> None:
    page, results, one = tmp_path / "page.md", tmp_path / "results.json", tmp_path / "run.json"
    page.write_text(f"before\n{report.MARKS[0]}\nOLD\n{report.MARKS[1]}\nafter\n")
    plugin.write(one, [row(["F9"], "tests/a.py::test_x", outcome)], plugin.environment())
    options = ["--results", str(results), "--out", str(page)]
    assert report.main([str(one), *options]) == status
    first = page.read_text()
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "OLD" not in first
    assert "| F9 |" in first
    assert report.main(options) == status
    assert page.read_text() == first


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.RESULTS.read_text())
    return found


def test_the_page_is_what_the_results_say() -> None:
    text = report.PAGE.read_text()
    assert report.with_tables(text, results()) == text


def test_every_test_of_the_page_exists() -> None:
    functions: dict[str, set[str]] = {}
    missing = []
    for test in (entry["test"] for entry in results()["tests"]):
        name, _, function = test.partition("::")
        if name not in functions:
            path = REPO / name
            tree = ast.parse(path.read_text() if path.is_file() else "")
            functions[name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if not (REPO / name).is_file() or (function and function.split("[")[0].split("::")[-1] not in functions[name]):
            missing.append(test)
    assert missing == []
    assert len(functions) > 5
