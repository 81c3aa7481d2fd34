"""Which step is loaded, which are kept, what is refused before anything is written, and what ``extra`` may be."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distmuon import checkpoint
from distmuon.errors import CheckpointError
from tests.checkpoint.disk import LATEST, MANIFEST, body, contents, debris, shards, step_directory, stored
from tests.checkpoint.scene import SMALL, Spec, Way, bits_differing, build, train, whole
from tests.ranks import run_threads

SPEC = Spec(SMALL, dtype="bfloat16")
ALONE = Way(alone=True)


def series(folder: Path, steps: list[int], keep: int | None = None) -> tuple[Any, Any]:
    """Save several steps; the state moves in between."""
    model, opt = build(SPEC, ALONE)
    for step in steps:
        train(model, opt, SPEC, step, step + 1)
        checkpoint.save(folder, model, opt, step=step, keep=keep)
    return model, opt


def found(folder: Path, **how: Any) -> int:
    model, opt = build(SPEC, ALONE, seed=8)
    return checkpoint.load(folder, model, opt, **how).step


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_????????"))


def test_layout(tmp_path: Path) -> None:
    """What the format promises to readers other than this package."""
    run_threads(2, both, tmp_path)
    path = tmp_path / "step_00000007"
    assert (tmp_path / LATEST).read_text() == "step_00000007\n"
    names = sorted(file.name for file in path.iterdir())
    assert names[:2] == ["manifest.json", "shard-00001-model-00001-of-00001.safetensors"]
    assert names[-1] == "state.json"
    assert all(name.startswith("shard-") for name in names[1:-1])
    content = body(path)
    assert (content["step"], content["world_size"], content["schema_number"]) == (7, 2, 1)
    assert sorted(content["files"]) == [name for name in names if name != MANIFEST]
    keys = {key for _, key, _ in stored(path)}
    assert keys == content["tensors"].keys()
    wanted = {f"{section}/w.{name}" for name in SMALL for section in ("weight", "first_moment", "master")}
    wanted |= {"second_moment/w.bias", *(f"buffer/{name}" for name in ("running", "counts", "even", "rough"))}
    assert {key for key in keys if not key.startswith("rng/")} == wanted
    assert {key.rpartition("/")[2] for key in keys if key.startswith("rng/")} == {"0", "1"}
    for key, tensor in content["tensors"].items():
        rows = sum(chunk["sizes"][0] if chunk["sizes"] else 1 for chunk in tensor["chunks"])
        assert rows == (tensor["shape"][0] if tensor["shape"] else 1), key
    state = json.loads((path / "state.json").read_bytes())
    assert (state["step"], state["extra"]) == (7, {"epoch": 3})
    assert len(state["groups"]) == 2


def both(rank: int, world: int, folder: Path) -> None:
    model, opt = build(SPEC, Way(world, "flat"))
    train(model, opt, SPEC, 0, 1, rank, world)
    checkpoint.save(folder, model, opt, step=7, extra={"epoch": 3})


def test_the_same_state_is_the_same_tensors(tmp_path: Path) -> None:
    """Two saves of one state differ in nothing but the run."""
    for folder in ("a", "b"):
        run_threads(2, both, tmp_path / folder)
    a, b = (contents(step_directory(tmp_path / folder, 7)) for folder in ("a", "b"))
    assert a.keys() == b.keys()
    for name in a:
        if name != MANIFEST and "rng" not in name:
            assert a[name] == b[name] or name.startswith("shard-"), name


def test_the_latest_is_loaded_unless_another_is_asked_for(tmp_path: Path) -> None:
    series(tmp_path, [1, 5, 3])
    assert found(tmp_path) == 3
    assert found(tmp_path, step=5) == 5
    assert found(step_directory(tmp_path, 1)) == 1
    with pytest.raises(CheckpointError, match="step_00000004"):
        found(tmp_path, step=4)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for last in range(1, 6):
        shutil.rmtree(tmp_path, ignore_errors=True)
        series(tmp_path, list(range(1, last + 1)), keep)
        assert steps(tmp_path) == list(range(1, last + 1))[-keep:]
        assert found(tmp_path) == last


def test_all_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    series(tmp_path, [1, 2, 3, 4])
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_only_whole_ones_count_and_only_ours_are_removed(tmp_path: Path) -> None:
    series(tmp_path, [1, 2, 3])
    (step_directory(tmp_path, 3) / MANIFEST).unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "why.txt").write_text("mine")
    (tmp_path / "step_00000000").mkdir()
    (tmp_path / "step_00000000" / "mine.txt").write_text("mine")
    model, opt = build(SPEC, ALONE)
    checkpoint.save(tmp_path, model, opt, step=4, keep=2)
    assert step_directory(tmp_path, 2).exists(), "the one before the damaged one is the second whole one"
    assert not step_directory(tmp_path, 1).exists()
    assert (tmp_path / "notes" / "why.txt").exists()
    assert (tmp_path / "step_00000000" / "mine.txt").exists()


def test_rolling_back_keeps_what_is_newer(tmp_path: Path) -> None:
    """After a return to step 1, ``keep`` never removes the step just saved."""
    model, opt = series(tmp_path, [1, 2, 3])
    shutil.rmtree(step_directory(tmp_path, 2))
    checkpoint.load(tmp_path, model, opt, step=1)
    checkpoint.save(tmp_path, model, opt, step=2, keep=1)
    assert 2 in steps(tmp_path)
    assert found(tmp_path) == 2


@pytest.mark.parametrize(
    "pointer", [None, b"", b"\n", b"step_00000009\n", b"\xff\xfe\x00", b"x" * 10_000, b"..\n", b".\n"]
)
def test_without_a_usable_pointer_the_newest_whole_step_is_taken(
    tmp_path: Path, pointer: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    series(tmp_path, [1, 2, 3])
    (step_directory(tmp_path, 3) / MANIFEST).unlink()
    if pointer is None:
        (tmp_path / LATEST).unlink()
    else:
        (tmp_path / LATEST).write_bytes(pointer)
    with caplog.at_level(logging.WARNING, "distmuon"):
        assert found(tmp_path) == 2
    assert any(LATEST in record.getMessage() for record in caplog.records)


def test_a_damaged_latest_is_not_passed_over(tmp_path: Path) -> None:
    """Going on silently from an older step would lose work; the user decides."""
    series(tmp_path, [1, 2])
    shard = shards(step_directory(tmp_path, 2))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        found(tmp_path)
    assert found(tmp_path, step=1) == 1


@pytest.mark.parametrize("where", ["empty", "missing"])
def test_nothing_to_load(tmp_path: Path, where: str) -> None:
    folder = tmp_path / where
    if where == "empty":
        folder.mkdir()
    with pytest.raises(CheckpointError, match=where):
        found(folder)
    with pytest.raises(CheckpointError, match=where):
        checkpoint.verify(folder)


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    model, opt = series(tmp_path, [1, 2])
    before = contents(tmp_path)
    train(model, opt, SPEC, 5, 6)
    for step in (2, 2):
        with pytest.raises(CheckpointError, match=f"step_{step:08d}"):
            checkpoint.save(tmp_path, model, opt, step=step)
    assert contents(tmp_path) == before


def test_a_step_that_was_never_pointed_at_is_written_anew(tmp_path: Path) -> None:
    """Killed between the rename and LATEST: training went on from the step before."""
    model, opt = series(tmp_path, [1, 2])
    (tmp_path / LATEST).write_text("step_00000001\n")
    train(model, opt, SPEC, 7, 8)
    checkpoint.save(tmp_path, model, opt, step=2)
    again, fresh = build(SPEC, ALONE, seed=8)
    assert checkpoint.load(tmp_path, again, fresh).step == 2
    assert bits_differing(whole(again, fresh), whole(model, opt)) == 0
    checkpoint.save(tmp_path, model, opt, step=3)
    assert debris(tmp_path) == []


def test_debris_goes(tmp_path: Path) -> None:
    series(tmp_path, [1])
    left = tmp_path / "step_00000002.tmp-0123456789ab"
    left.mkdir()
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"torn")
    (tmp_path / "LATEST.tmp-17").write_text("step_")
    assert found(tmp_path) == 1
    series(tmp_path, [2])
    assert debris(tmp_path) == []
    assert steps(tmp_path) == [1, 2]


def test_debris_that_is_a_link_goes_and_not_what_it_points_to(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_00000002.tmp-000000000000").symlink_to(mine)
    series(tmp_path / "run", [1])
    assert (mine / "file").read_text() == "mine"
    assert debris(tmp_path / "run") == []


EXTRAS: dict[str, Any] = {
    "nothing": {},
    "all kinds": {"a": 1, "b": 2.5, "c": "text \u00e9\u4e16", "d": None, "e": True, "f": [1, [2, {"g": []}]], "": 0},
    "numbers": {"large": 2**80, "small": 5e-324, "minus zero": -0.0, "third": 1 / 3},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_comes_back(tmp_path: Path, extra: str) -> None:
    model, opt = build(SPEC, ALONE)
    checkpoint.save(tmp_path, model, opt, step=0, extra=EXTRAS[extra])
    restored = checkpoint.load(tmp_path, model, opt)
    assert restored.extra == EXTRAS[extra]
    assert repr(restored.extra.get("minus zero")) == repr(EXTRAS[extra].get("minus zero"))


LOOP: list[Any] = []
LOOP.append(LOOP)
NOT_JSON: dict[str, Any] = {
    "an object": {"a": object()},
    "a set": {"a": {1}},
    "bytes": {"a": b"x"},
    "a tensor": {"a": torch.ones(2)},
    "not a number": {"a": float("nan")},
    "infinity": {"a": [float("inf")]},
    "a key that is a number": {1: "a"},
    "a nested key that is a number": {"a": {1: "b"}},
    "a key that is None": {None: 1},
    "a loop": {"a": LOOP},
    "a list": [1, 2],
    "text": "epoch",
}


@pytest.mark.parametrize("extra", NOT_JSON)
def test_extra_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, extra: str) -> None:
    model, opt = build(SPEC, ALONE)
    with pytest.raises(CheckpointError, match="extra"):
        checkpoint.save(tmp_path, model, opt, step=1, extra=NOT_JSON[extra])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 1.0, True, "1", None, 2**63])
def test_a_step_that_is_no_step(tmp_path: Path, step: Any) -> None:
    model, opt = build(SPEC, ALONE)
    if step == 2**63:
        checkpoint.save(tmp_path, model, opt, step=step)
        assert found(tmp_path) == step
        return
    with pytest.raises(CheckpointError, match="step"):
        checkpoint.save(tmp_path, model, opt, step=step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, -1, 1.5, "2", True])
def test_a_number_to_keep_that_is_none(tmp_path: Path, keep: Any) -> None:
    model, opt = build(SPEC, ALONE)
    with pytest.raises(CheckpointError, match="keep"):
        checkpoint.save(tmp_path, model, opt, step=1, keep=keep)
    assert list(tmp_path.iterdir()) == []


def disagree(rank: int, world: int, folder: Path, what: str) -> str:
    """Rank 1 asks for something else than the others, or for something illegal."""
    model, opt = build(SPEC, Way(world))
    arguments: dict[str, Any] = {"step": 3, "extra": {"a": 1}}
    if rank == 1:
        other: dict[str, dict[str, Any]] = {
            "step": {"step": 4},
            "illegal step": {"step": -1},
            "illegal extra": {"extra": {"a": {1}}},
        }
        arguments |= other[what]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, model, opt, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("what", ["step", "illegal step", "illegal extra"])
def test_ranks_that_ask_for_different_things_are_refused_together(tmp_path: Path, what: str) -> None:
    messages = run_threads(3, disagree, tmp_path, what, timeout=15)
    assert len(set(messages)) == 1
    assert not tmp_path.exists() or steps(tmp_path) == []
