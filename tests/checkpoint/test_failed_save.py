"""A save that fails on one rank fails on all of them, soon; training goes on and the step before stays the latest."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from distmuon import checkpoint
from distmuon.errors import CheckpointError
from tests.checkpoint.disk import LATEST, debris
from tests.checkpoint.forked import run_forked, values
from tests.checkpoint.scene import Figure, Spec, Way, bits_differing, build, train, whole
from tests.ranks import run_threads

SPEC = Spec({"tall": ((64, 48), "muon"), "square": ((48, 48), "muon"), "table": ((40, 20), "adamw")})


def failing(call: Callable[..., Any], at: str, code: int) -> Callable[..., Any]:
    """The call, except that it fails where the file that it is about has ``at`` in its name."""

    def attempt(first: Any, *rest: Any, **named: Any) -> Any:
        subject = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        target = os.fspath(rest[0]) if rest and isinstance(rest[0], str | os.PathLike) else subject
        if at in (Path(subject).name + " " + Path(target).name):
            raise OSError(code, os.strerror(code), subject)
        return call(first, *rest, **named)

    return attempt


@contextmanager
def broken(operation: str, at: str, code: int) -> Iterator[None]:
    """One operation of the operating system that fails for one file, on the thread of any rank."""
    names = {"rename": ("rename", "replace")}.get(operation, (operation,))
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(os, name, failing(getattr(os, name), at, code)))
        yield


def fail_once(rank: int, world: int, folder: Path, fault: tuple[str, str, int] | None) -> dict[str, Any]:
    """Save, fail to save, train on, save again; compare with a twin that never tried."""
    model, opt = build(SPEC, Way(world))
    train(model, opt, SPEC, 0, 1, rank, world)
    checkpoint.save(folder, model, opt, step=1)
    saved = whole(model, opt)
    train(model, opt, SPEC, 1, 2, rank, world)
    before = whole(model, opt)
    dist.barrier()
    message, seconds = attempt(rank, folder, model, opt, fault)
    dist.barrier()
    seen = {
        "message": message,
        "seconds": seconds,
        "touched": bits_differing(whole(model, opt), before),
        "latest": (folder / LATEST).read_text(),
        "left": [name for name in debris(folder) if ".tmp" in name],
    }
    again, fresh = build(SPEC, Way(world, "flat"), seed=8)
    seen["step"] = checkpoint.load(folder, again, fresh).step
    seen["loaded"] = bits_differing(whole(again, fresh), saved if seen["step"] == 1 else before)
    train(model, opt, SPEC, 2, 3, rank, world)
    checkpoint.save(folder, model, opt, step=3)
    seen["debris"] = debris(folder)
    seen["next"] = checkpoint.load(folder, again, fresh).step
    seen["differing"] = bits_differing(whole(again, fresh), straight(rank, world))
    return seen


def attempt(rank: int, folder: Path, model: Any, opt: Any, fault: tuple[str, str, int] | None) -> tuple[str, float]:
    """Save on a disk that is broken for all threads together; the error and how long it took."""
    patch = broken(*fault) if fault is not None and rank == 0 else None
    if patch is not None:
        patch.__enter__()
    dist.barrier()
    started = time.monotonic()
    try:
        checkpoint.save(folder, model, opt, step=2)
        message = ""
    except CheckpointError as error:
        message = str(error)
    seconds = time.monotonic() - started
    dist.barrier()
    if patch is not None:
        patch.__exit__(None, None, None)
    return message, seconds


def straight(rank: int, world: int) -> Any:
    model, opt = build(SPEC, Way(world))
    train(model, opt, SPEC, 0, 3, rank, world)
    return whole(model, opt)


FAULTS = [
    ("fsync", "shard-00001", errno.EIO),
    ("fsync", "shard-00002", errno.EIO),
    ("fsync", "state.json", errno.EIO),
    ("fsync", "manifest.json", errno.ENOSPC),
    ("fsync", "step_00000002.tmp-", errno.EIO),
    ("mkdir", "step_00000002.tmp-", errno.EROFS),
    ("rename", "step_00000002", errno.EIO),
    ("fsync", "LATEST", errno.ENOSPC),
    ("rename", "LATEST", errno.EROFS),
]


@pytest.mark.fault("F5")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]} {fault[1]}")
def test_a_failing_disk(tmp_path: Path, fault: tuple[str, str, int], figure: Figure) -> None:
    ranks = run_threads(2, fail_once, tmp_path, fault)
    assert len({seen["message"] for seen in ranks}) == 1
    for seen in ranks:
        assert os.strerror(fault[2]) in seen["message"]
        assert seen["seconds"] < 5
        assert (seen["touched"], seen["loaded"], seen["differing"]) == (0, 0, 0)
        assert (seen["latest"], seen["step"], seen["next"]) == ("step_00000001\n", 1, 3)
        assert seen["debris"] == []
        assert seen["left"] == [] or "LATEST" in fault[1]
    slowest = max(seen["seconds"] for seen in ranks)
    figure(f"{fault[0]} of {fault[1]} fails: same error on 2 of 2 ranks within {slowest:.2f} s, 0 bits of state differ")


def test_the_fault_is_what_fails(tmp_path: Path) -> None:
    for seen in run_threads(2, fail_once, tmp_path, None):
        assert (seen["message"], seen["step"], seen["next"], seen["differing"]) == ("", 2, 3, 0)


def crowded(rank: int, world: int, folder: Path, limited: int) -> dict[str, Any]:
    """Save where a file may not grow beyond 8 KB on one rank; the operating system itself says so."""
    model, opt = build(SPEC, Way(world))
    train(model, opt, SPEC, 0, 1, rank, world)
    checkpoint.save(folder, model, opt, step=1)
    saved = whole(model, opt)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    return {**refused(folder, model, opt), "loaded": loads(folder, world, saved)}


def refused(folder: Path, model: Any, opt: Any) -> dict[str, Any]:
    started = time.monotonic()
    try:
        checkpoint.save(folder, model, opt, step=2)
    except CheckpointError as error:
        return {"message": str(error), "seconds": time.monotonic() - started}
    return {"message": "", "seconds": 0.0}


def loads(folder: Path, world: int, saved: Any) -> tuple[int, int]:
    again, fresh = build(SPEC, Way(world), seed=8)
    step = checkpoint.load(folder, again, fresh).step
    return step, bits_differing(whole(again, fresh), saved)


def judge(answers: list[dict[str, Any]], reason: str) -> float:
    """The same error on every rank in time, and the old step; the slowest rank's seconds."""
    assert len({seen["message"] for seen in answers}) == 1, answers
    for seen in answers:
        assert reason in seen["message"]
        assert seen["seconds"] < 5
        assert seen["loaded"] == (1, 0)
    return max(float(seen["seconds"]) for seen in answers)


@pytest.mark.fault("F5")
@pytest.mark.parametrize("limited", [0, 1])
def test_a_rank_that_may_not_write_more(tmp_path: Path, limited: int, figure: Figure) -> None:
    answers = values(run_forked(crowded, tmp_path, limited, world=2))
    seconds = judge(answers, f"rank {limited}")
    figure(f"rank {limited} of 2 exceeds RLIMIT_FSIZE: same error on both after {seconds:.2f} s, old step loads")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "distmuon-test", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def on_small_disk(rank: int, world: int, folder: Path, how: str) -> dict[str, Any]:
    """The first save fits; then the disk is full, or cannot be written to any more."""
    model, opt = build(SPEC, Way(world))
    train(model, opt, SPEC, 0, 1, rank, world)
    checkpoint.save(folder, model, opt, step=1)
    saved = whole(model, opt)
    dist.barrier()
    if rank == 0 and how == "full":
        left = shutil.disk_usage(folder).free
        (folder / "filler").write_bytes(b"x" * (left - 16384))
    elif rank == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    dist.barrier()
    seen = refused(folder, model, opt)
    dist.barrier()
    if rank == 0:
        seen["left"] = [name for name in debris(folder) if ".tmp" in name]
    return {**seen, "loaded": loads(folder, world, saved)}


@pytest.mark.fault("F5")
@pytest.mark.parametrize(("how", "reason"), [("full", "No space left"), ("read-only", "Read-only file system")])
def test_a_disk_that_is(mounted: Path, how: str, reason: str, figure: Figure) -> None:
    answers = values(run_forked(on_small_disk, mounted, how, world=2))
    seconds = judge(answers, reason)
    assert answers[0]["left"] == []
    figure(f"{how} file system: same error on 2 of 2 ranks after {seconds:.2f} s, old step loads")


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for message in run_threads(2, onto_file, tmp_path / "file"):
        assert "file" in message


def onto_file(rank: int, world: int, path: Path) -> str:
    model, opt = build(SPEC, Way(world))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(path, model, opt, step=1)
    return str(caught.value)
