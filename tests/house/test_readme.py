"""The README's code runs and its figures are the measured ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from distmuon.benchmarks import comm

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_training_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    loop = max(blocks("python"), key=len)
    exec(compile(loop, "README.md", "exec"), {})  # noqa: S102
    assert "hidden matrix" in capsys.readouterr().out


def test_code_of_the_placement_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "placement.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(code, "placement.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.splitlines() == [
        "scatter [40576, 40576, 40576, 40576] 486912",
        "[('muon', (64, 64, 64)), ('muon', (256, 256)), ('adamw', None)]",
    ]


def test_json_is_a_distmuon_configuration() -> None:
    from distmuon.config import ShardSettings, parse

    (text,) = blocks("json")
    optimizer = json.loads(text)["optimizer"]
    assert optimizer["type"] == "DistMuon"
    parse(ShardSettings, optimizer["params"], "README")


def test_bytes_are_the_measured_ones() -> None:
    rows = json.loads(comm.RESULTS.read_text())["rows"]
    assert comm.with_table(README, rows) == README


def test_measured_bytes_of_balanced_equal_adamw() -> None:
    rows = json.loads(comm.RESULTS.read_text())["rows"]
    for row in rows:
        assert row["name"] != "DistMuon balanced" or abs(row["ratio"] - 1.0) < 1e-4


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / path).stat().st_size > 1000


def test_predictions_on_links_are_as_close_as_stated() -> None:
    contenders = json.loads((comm.RESULTS.parent / "links.json").read_text())["contenders"]
    errors = [abs(row["error"]) for contender in contenders for row in contender["rows"]]
    assert len(errors) >= 25
    assert max(errors) <= 0.2
