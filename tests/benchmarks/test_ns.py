"""The speed benchmark: flags, targets on made-up figures, and a short run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distmuon.benchmarks import ns, ns_chart, ns_targets, ns_thresholds
from distmuon.benchmarks.ns_candidates import DEFAULT, EAGER, ONE_BY_ONE, STOCK, Shape
from distmuon.benchmarks.ns_targets import Target

Captured = pytest.CaptureFixture[str]
ACCEPTED = {"error": 4e-7, "legal": 1e-6, "accepted": True, "gain": {"of_best": 2.1}}


def group(shape: str, given: str, ratios: dict[str, float], over_twin: float | None = None) -> dict[str, Any]:
    def spread(value: float) -> dict[str, float]:
        return {"of_best": value, "median": value, "low": value - 0.1, "high": value + 0.1}

    rows = [
        {
            **{"candidate": name, "form": "plain", "error": 0.01, "ms": 10 / value, "median_ms": 11 / value},
            "over_eager": spread(value),
            "twin": ONE_BY_ONE if name == DEFAULT and over_twin else None,
            "over_twin": spread(over_twin) if name == DEFAULT and over_twin else None,
        }
        for name, value in {EAGER: 1.0, **ratios}.items()
    ]
    return {"shape": shape, "batch": 1 if shape.count("x") == 1 else 64, "input": given, "rows": rows}


def test_shapes() -> None:
    assert ns.shapes("64x32x64, 7x5") == [Shape(64, 32, 64), Shape(1, 7, 5)]
    assert [str(shape) for shape in ns.shapes("64x32x64,7x5")] == ["64x32x64", "7x5"]
    assert ns.parse([]).shapes == [*ns.SINGLE, *ns.BATCHES]
    quick = ns.parse(["--quick"])
    assert (quick.shapes, quick.rounds) == ([*ns.QUICK], ns.QUICK_ROUNDS)
    chosen = ns.parse(["--quick", "--shapes", "8x8", "--rounds", "4"])
    assert (chosen.shapes, chosen.rounds) == ([Shape(1, 8, 8)], 4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--shapes 8", '"8" is not a shape; write ROWSxCOLS'),
        ("--shapes 8x0", '"8x0" is not a shape'),
        ("--shapes 8x8,2x2x2x2", '"2x2x2x2" is not a shape'),
        ("--rounds 1", '"1" is not a whole number of 2 or more'),
        ("--threads 0", '"0" is not a whole number of 1 or more'),
        ("--threads two", '"two" is not a whole number'),
        ("--device tpu", "tpu"),
        ("--thresholds --device cuda", "--thresholds are those of the CPU"),
    ],
)
def test_wrong_flags(flags: str, named: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        ns.parse(flags.split())
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_the_worst_input_and_shape_count() -> None:
    groups = [
        group("1024x4096", "float32", {STOCK: 1.2, DEFAULT: 1.6, "opt5 gram": 1.5, "opt4 gram": 2.1}),
        group("1024x4096", "bfloat16", {STOCK: 1.2, DEFAULT: 1.7, "opt5 gram": 1.4, "opt4 gram": 2.2}),
        group("512x512", "float32", {STOCK: 1.25, DEFAULT: 1.0}),
        group("64x32x64", "float32", {STOCK: 1.0, DEFAULT: 9.0}, over_twin=11.0),
    ]
    found = {target.name: target for target in ns_targets.judge(groups, None)}
    assert found["opt5 gram over eager at 1024x4096"] == Target(
        "opt5 gram over eager at 1024x4096", 1.45, 1.4, "1024x4096 from bfloat16", passed=False
    )
    assert found["opt4 gram over eager at 1024x4096"].passed
    assert (found[f"{DEFAULT} over eager at 1024x4096"].value, found[f"{DEFAULT} over eager at 1024x4096"].aim) == (
        1.6,
        1.5,
    )
    assert not found["64x32x64 in one batch over one by one"].passed
    assert found["64x32x64 in one batch over one by one"].value == 11.0
    assert (found[f"{DEFAULT} over eager, any shape"].value, found[f"{DEFAULT} over eager, any shape"].passed) == (
        1.0,
        True,
    )
    rival = found[f"{DEFAULT} over {STOCK}, any shape"]
    assert (rival.value, rival.where, rival.passed) == (pytest.approx(0.8), "512x512 from float32", False)
    # Nothing is said of what was not measured.
    assert not [name for name in found if "128x128" in name or "DeepSpeed" in name or "float32 products" in name]


@pytest.mark.parametrize(
    ("change", "passed", "value"),
    [
        ({}, True, 2.1),
        ({"gain": {"of_best": 1.7}}, False, 1.7),
        ({"error": 2e-3}, False, 2.1),
        ({"error": 2e-3, "accepted": False}, True, None),
        ({"accepted": False}, False, None),
    ],
)
def test_float32_products_are_fast_and_exact_or_not_used(change: dict[str, Any], passed: bool, value: float) -> None:
    target = ns_targets.judge_float32(ACCEPTED | change)
    assert (target.passed, target.value) == (passed, value)
    assert target.where.startswith("rejected by the probe") == (value is None)


def test_tables() -> None:
    lines = ns_targets.rows(group("64x32x64", "float32", {DEFAULT: 9.0}, over_twin=11.0)).splitlines()
    assert lines[0] == "64x32x64 from float32:"
    assert lines[-1] == f"| {DEFAULT} | plain | 1.0e-02 | 1.11 | 9.00 | 9.00 | 8.90 - 9.10 | 11.00 ({ONE_BY_ONE}) |"
    missed = ns_targets.table(
        [Target("a", 2.0, 1.994, "here", passed=False), Target("b", 1.8, None, "no", passed=True)]
    )
    assert missed.splitlines()[-2:] == ["| MISS | a | >= 2 | 1.99 | here |", "| PASS | b | >= 1.8 | - | no |"]


def test_from_where_panels_pay() -> None:
    cells = [[256, 256, 0.8], [256, 1024, 1.1], [512, 256, 0.9], [512, 1024, 1.2], [1024, 256, 0.9], [1024, 1024, 1.3]]
    assert ns_thresholds.pays_from(cells) == [256, 1024]
    assert ns_thresholds.pays_from([*cells, [256, 2048, 0.9]]) == [512, 1024]
    assert ns_thresholds.pays_from([[256, 256, 0.9]]) is None


def test_a_short_run(tmp_path: Path, capsys: Captured) -> None:
    path, before = tmp_path / "new" / "ns.json", torch.get_num_threads()
    assert (
        ns.main(["--quick", "--shapes", "16x48,3x16x32", "--rounds", "2", "--device", "cpu", "--json", str(path)]) == 0
    )
    assert torch.get_num_threads() == before
    results = json.loads(path.read_text())
    assert set(results) == {"machine", "rounds", "groups", "float32", "targets"}
    assert (results["rounds"], results["machine"]["threads"]) == (2, 1)
    assert results["machine"]["clock"] == "CPU time of the thread"
    shown = [(one["shape"], one["input"]) for one in results["groups"]]
    assert shown == [(shape, given) for shape in ("16x48", "3x16x32") for given in ("float32", "bfloat16")]
    for one in results["groups"]:
        baseline, *others = one["rows"]
        assert baseline["candidate"] == EAGER
        assert set(baseline["over_eager"].values()) == {1.0}
        assert all(row["ms"] > 0 and row["median_ms"] >= row["ms"] and row["error"] < 0.06 for row in one["rows"])
        best = {row["candidate"]: row["ms"] for row in one["rows"]}
        for row in others:
            assert row["over_eager"]["of_best"] == pytest.approx(best[EAGER] / row["ms"])
            assert (row["twin"] is None) == (row["over_twin"] is None)
            assert row["twin"] is None or row["over_twin"]["of_best"] == pytest.approx(best[row["twin"]] / row["ms"])
    out = capsys.readouterr().out
    assert "16x48 from float32:" in out
    verdicts = [line for line in out.splitlines() if line.startswith(("| PASS", "| MISS"))]
    assert len(verdicts) == len(results["targets"]) >= 3
    figure = ns_chart.draw(results)
    figure.savefig(tmp_path / "ns.png")
    assert (tmp_path / "ns.png").stat().st_size > 10_000
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()] == ["16x48", "3 of 16x32"]


def test_short_thresholds(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns_thresholds, "HEIGHT_SHAPES", ((128, 256),))
    monkeypatch.setattr(ns_thresholds, "ROWS", (256, 384))
    path = tmp_path / "thresholds.json"
    flags = ["--thresholds", "--quick", "--rounds", "2", "--device", "cpu", "--json", str(path)]
    assert ns.main(flags) == 0
    found = json.loads(path.read_text())
    assert [cell[:2] for cell in found["gram"]] == [[256, 256], [256, 512], [384, 512]]
    assert [cell[:3] for cell in found["heights"]] == [[128, 256, height] for height in ns_thresholds.HEIGHTS]
    assert all(cell[-1] > 0 for name in ("gram", "square", "heights", "loop") for cell in found[name])
    out = capsys.readouterr().out
    for name in ns_thresholds.CONSTANTS:
        assert f"{name} = {found[name]}" in out
