"""Checkpoints of every schema there ever was still load, bit for bit; those of a schema to come are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distmuon import checkpoint
from distmuon.errors import CheckpointError
from tests.checkpoint.disk import body, contents, reseal, step_directory
from tests.checkpoint.scene import Figure, Way, Whole, bits_differing, build, whole
from tests.golden.make import EXTRA, HERE, SPEC, STEP, WORLD, values
from tests.ranks import run_threads

GOLDEN = sorted(path.name for path in HERE.glob("schema_*"))
WAYS = [Way(1, alone=True), Way(1), Way(2), Way(3, "flat"), Way(4, "team")]


def load(rank: int, world: int, folder: Path, way: Way) -> tuple[Whole, list[float], Any]:
    model, opt = build(SPEC, way, seed=8)
    restored = checkpoint.load(folder, model, opt)
    assert restored.step == STEP
    return whole(model, opt), [group["lr"] for group in opt.param_groups], restored.extra


def wanted(like: Whole) -> Whole:
    """Every value as the script computes it."""
    return {k: torch.tensor(STEP - 1) if k.startswith("updates/") else values(k, v) for k, v in like.items()}


@pytest.mark.fault("F23")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.world},{way.policy},{way.alone}")
@pytest.mark.parametrize("schema", GOLDEN)
def test_a_golden_checkpoint_loads(schema: str, way: Way, figure: Figure) -> None:
    before = contents(HERE / schema)
    for found, rates, extra in run_threads(way.world, load, HERE / schema, way):
        assert bits_differing(found, wanted(found)) == 0
        assert {key.partition("/")[0] for key in found} == {
            *("weight", "buffer", "first_moment", "second_moment", "master", "updates")
        }
        assert rates == [0.25, 0.125, 0.25 / 3]
        assert extra == EXTRA
    assert contents(HERE / schema) == before
    size = sum(map(len, before.values())) / 1024
    assert size <= 100
    figure(
        f"{schema}, {size:.0f} KiB, written by {WORLD} ranks, on {way.world}: 0 of {8 * 1024 * size:.0f} bits differ"
    )


@pytest.mark.fault("F23")
@pytest.mark.parametrize("schema", GOLDEN)
def test_a_golden_checkpoint_is_whole(schema: str, figure: Figure) -> None:
    found = checkpoint.verify(HERE / schema)
    assert (found.step, found.world_size) == (STEP, WORLD)
    figure(f"{schema} is whole")


def test_there_is_one_of_every_schema() -> None:
    newest = max(body(step_directory(HERE / schema, STEP))["schema_number"] for schema in GOLDEN)
    assert [f"schema_{number}" for number in range(1, newest + 1)] == GOLDEN
    from distmuon.checkpoint.manifest import SCHEMA

    assert newest == SCHEMA, "python -m tests.golden.make"


@pytest.mark.fault("F23")
@pytest.mark.parametrize("schema", [2, 7, 10**6, 0, -1, "1", None])
def test_a_schema_to_come_is_refused_with_both_numbers(tmp_path: Path, schema: Any, figure: Figure) -> None:
    """Even if the rest of the manifest has a form that nobody knows yet."""
    folder = Path(shutil.copytree(HERE / GOLDEN[-1], tmp_path / "copy"))
    path = step_directory(folder, STEP)
    reseal(path, lambda content: content.update(schema_number=schema))
    model, opt = build(SPEC, Way(alone=True), seed=8)
    before = whole(model, opt)
    for attempt in (lambda: checkpoint.verify(path), lambda: checkpoint.load(folder, model, opt)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert repr(schema) in str(caught.value)
        assert "schema 1" in str(caught.value)
        assert "manifest.json" in str(caught.value)
    assert bits_differing(whole(model, opt), before) == 0
    figure(f"schema {schema!r} refused, naming it and schema 1")


def test_a_newer_manifest_may_look_quite_different(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HERE / GOLDEN[-1], tmp_path / "copy"))
    path = step_directory(folder, STEP)

    def change(content: dict[str, Any]) -> None:
        content.clear()
        content.update(schema_number=2, layout={"new": True})

    reseal(path, change)
    with pytest.raises(CheckpointError, match=r"schema 2.*schema 1"):
        checkpoint.verify(path)
