"""Every kernel compiles for every target within the budgets: the short form of ``make kernels``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distmuon.benchmarks import kernels
from distmuon.benchmarks.compiled import budgets, table
from distmuon.benchmarks.compiled.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "distmuon.benchmarks.kernels", "--jobs", "1", *options]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**clean, "TRITON_CACHE_DIR": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


@pytest.mark.fault("F17")
def test_first_choices_are_within_the_budgets(tmp_path: Path, figure: Callable[[str], None]) -> None:
    out = tmp_path / "kernels.json"
    done = run(tmp_path, "--quick", "--json", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    found, recorded = json.loads(out.read_text()), json.loads(kernels.RESULTS.read_text())
    assert found["tools"] == recorded["tools"]
    records = found["kernels"]
    targets = sorted({record["target"] for record in records})
    figure(f"{len(records)} kernels compiled for {', '.join(targets)} within their budgets, never run there")
    stale = [record for record in records if record not in recorded["kernels"]]
    assert not stale, "the recorded figures are of other kernels; run make kernels"
    assert {(record["target"], record["kernel"]) for record in records} == {
        (target, kernel) for target in TARGETS for kernel in kernels.KERNELS
    }
    for target in ("sm_90", "sm_100"):
        assert {r["variant"] for r in records if r["target"] == target} == {"pointer", "descriptor"}
    # A descriptor's tiles come through TMA and a pointer's through cp.async: what was compiled is what was asked for.
    for record in records:
        if record["target"] in ("sm_90", "sm_100") and record["kernel"] != "momentum":
            assert (record["tma_loads"] > 0) == (record["variant"] == "descriptor")
            assert (record["async_copies"] > 0) == (record["variant"] == "pointer")


def test_an_interpreter_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--quick", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(("option", "value"), [("--target", "sm_90,sm_75"), ("--kernel", "symetric")])
def test_unknown_names_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main([option, value])
    assert f"{value.split(',')[-1]!r} is not one of" in capsys.readouterr().err


def test_a_broken_budget_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(kernels.RESULTS.read_text())["kernels"]
    row = next(r for r in records if (r["target"], r["kernel"], r["default"]) == ("sm_90", "symmetric", True))
    found: list[dict[str, Any]] = [row]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "compile_kernels", lambda *arguments, **keywords: found)
    command = ["--quick", "--json", str(tmp_path / "out.json")]
    assert kernels.main(command) == 0
    found[0] = row | {"spill_stores": 4}
    assert kernels.main(command) == 1
    assert "on sm_90: spill_stores is 4, at most 0" in capsys.readouterr().err


def test_recorded_results_are_within_the_budgets_and_in_the_document() -> None:
    results = json.loads(kernels.RESULTS.read_text())
    assert [sentence for record in results["kernels"] for sentence in budgets.breaches(record)] == []
    public = json.loads(kernels.RIVALS.read_text())
    assert table.document(kernels.DOCUMENT.read_text(), results, public) == kernels.DOCUMENT.read_text()
    assert results["tools"] == public["tools"]
    assert results["work"] == table.work()
