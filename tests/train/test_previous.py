"""Which earlier runs may be continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distmuon.config import parse
from distmuon.errors import ConfigError
from distmuon.train.config import RunConfig
from distmuon.train.previous import Previous, find_previous
from tests.train.synthetic_runs import write_run


def run(out: Path, **changes: Any) -> RunConfig:
    table = {"name": "old", "out": str(out), "resume": "auto", "schedule": {"updates": 3}, **changes}
    return parse(RunConfig, table, "test")


def earlier(out: Path, **changes: Any) -> None:
    write_run(out / "old", "old", [3.0, 2.0, 1.0], config=run(out, resume="never").model_dump(mode="json"), **changes)


def test_nothing_there(tmp_path: Path) -> None:
    assert find_previous(run(tmp_path)) == Previous(started=False, complete=False)
    assert find_previous(run(tmp_path, resume="never")) == Previous(started=False, complete=False)


def test_a_complete_run(tmp_path: Path) -> None:
    earlier(tmp_path)
    assert find_previous(run(tmp_path)) == Previous(started=True, complete=True)


def test_a_run_without_its_final_record_is_not_complete(tmp_path: Path) -> None:
    earlier(tmp_path, end={})
    assert find_previous(run(tmp_path)) == Previous(started=True, complete=False)


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    earlier(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume auto"):
        find_previous(run(tmp_path, resume="never"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, "seed = 0 and cannot go on with 7"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr = 0.008"),
        ({"batch": {"sequences": 8}}, "batch.sequences = 16"),
        ({"schedule": {"updates": 9}}, "schedule.updates = 3"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    earlier(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_previous(run(tmp_path, **changes))
    assert named in str(caught.value)


def test_what_may_differ(tmp_path: Path) -> None:
    earlier(tmp_path)
    changes = {"checkpoint": {"every": 1, "keep": 9}, "evaluation": {"every": 2}}
    assert find_previous(run(tmp_path, **changes, trace=True, trace_steps=7)).complete


def test_an_unreadable_record_is_named(tmp_path: Path) -> None:
    earlier(tmp_path)
    metrics = tmp_path / "old" / "metrics.jsonl"
    metrics.write_text("nonsense\n" + json.dumps({}) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        find_previous(run(tmp_path))
