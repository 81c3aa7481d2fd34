"""The markers fault and soak, the fixture figure, and --fault-report=FILE: what the tests of faults measured."""

from __future__ import annotations

import functools
import json
import os
import platform
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

TABLE = Path(__file__).with_name("table.toml")
# A test is as bad as its worst part: an error in the fixtures after a passed call makes it an error.
WORST_FIRST = ("error", "failed", "skipped", "passed")


@functools.cache
def read_table() -> dict[str, dict[str, str]]:
    """The faults by id, each with the keys "fault" and "holds"."""
    rows: dict[str, dict[str, str]] = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return rows


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--soak", action="store_true", help="also run the tests that are too long for `make test`")
    group.addoption(
        "--fault-report", metavar="FILE", type=Path, help="write what the tests of faults measured; --fault-report=FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(*ids): shows what holds under these faults of tests/faults/table.toml")
    config.addinivalue_line("markers", "soak: too long for `make test`; runs with --soak only")
    target: Path | None = config.getoption("--fault-report")
    if target is not None:
        config.pluginmanager.register(Reporter(target), "fault-reporter")


def faults_of(item: pytest.Item) -> list[str]:
    """Ids of the faults that a test is marked with, in the order of the table."""
    found = {name for mark in item.iter_markers("fault") for name in mark.args}
    unknown = found - set(read_table())
    if unknown:
        raise pytest.UsageError(f"{item.nodeid}: {', '.join(sorted(unknown))} is not a fault of {TABLE.name}")
    return [name for name in read_table() if name in found]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="takes long; --soak runs it")
    for item in items:
        item.user_properties += [("fault", name) for name in faults_of(item)]
        if item.get_closest_marker("soak") and not config.getoption("--soak"):
            item.add_marker(skip)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with one sentence about what was measured; several calls are several figures."""

    def record(sentence: str) -> None:
        assert sentence.strip(), "a figure says what was measured"
        # As record_property does, which warns about a format of JUnit reports that nobody reads here.
        request.node.user_properties.append(("figure", sentence))

    return record


def environment() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
    }


class Reporter:
    """Collects the outcome of every test that is marked with a fault, and writes them at the end."""

    def __init__(self, target: Path) -> None:
        self.target = target.absolute()
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        faults = [str(value) for name, value in report.user_properties if name == "fault"]
        if not faults:
            return
        start = {"faults": faults, "test": report.nodeid, "outcome": "passed", "figures": [], "seconds": 0.0}
        row = self.rows.setdefault(report.nodeid, start)
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        row["outcome"] = min(row["outcome"], outcome, key=WORST_FIRST.index)
        # Every report has all that came before it.
        row["figures"] = [str(value) for name, value in report.user_properties if name == "figure"]
        if report.when == "call":
            row["seconds"] = round(report.duration, 2)

    def pytest_sessionfinish(self) -> None:
        write(self.target, list(self.rows.values()), environment())


def write(target: Path, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Write a report, one line a test; ``python -m tests.faults.report`` reads it."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    text = f'{{\n "environment": {json.dumps(environment)},\n "tests": [\n{lines}\n ]\n}}\n'
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
