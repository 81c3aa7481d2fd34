"""Killed anywhere in a save: the step that LATEST names is whole, and what was left behind goes at the next save."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from distmuon import checkpoint
from tests.checkpoint import tracing
from tests.checkpoint.disk import LATEST, debris, step_directory
from tests.checkpoint.forked import Answer, run_forked, values
from tests.checkpoint.scene import Figure, Spec, Way, Whole, bits_differing, build, train, whole
from tests.ranks import run_threads

SPEC = Spec(
    {"tall": ((24, 8), "muon"), "square": ((9, 9), "muon"), "table": ((10, 3), "adamw"), "norm": ((7,), "adamw")},
    dtype="bfloat16",
)
OLD, NEW = 2, 3


def prepare(rank: int, world: int, folder: Path) -> Whole:
    """Two whole steps, of which the next save removes the first."""
    model, opt = build(SPEC, Way(world))
    for step in range(OLD):
        train(model, opt, SPEC, step, step + 1, rank, world)
        checkpoint.save(folder, model, opt, step=step + 1, keep=2)
    return whole(model, opt)


def go_on(rank: int, world: int, folder: Path) -> Whole:
    """What the next save is to write."""
    model, opt = build(SPEC, Way(world))
    checkpoint.load(folder, model, opt)
    train(model, opt, SPEC, OLD, NEW, rank, world)
    return whole(model, opt)


@pytest.fixture(scope="module")
def before() -> Iterator[tuple[Path, Whole, Whole]]:
    """A folder to copy, the state in it, and the state of the next step."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        yield folder, run_threads(2, prepare, folder)[0], run_threads(2, go_on, folder)[0]


def save_and_die(rank: int, world: int, folder: Path, victims: list[int], die_at: int) -> list[tuple[str, str]]:
    """Save the next step; victims kill themselves before their event number ``die_at``."""
    model, opt = build(SPEC, Way(world))
    checkpoint.load(folder, model, opt)
    train(model, opt, SPEC, OLD, NEW, rank, world)
    tracer = tracing.trace(folder, die_at if rank in victims else -1)
    checkpoint.save(folder, model, opt, step=NEW, keep=2)
    return tracer.events


def examine(folder: Path, old: Whole, new: Whole) -> tuple[int, int]:
    """Step that a restart finds and bits that differ; also goes on from there and saves once more."""
    named = (folder / LATEST).read_text()
    model, opt = build(SPEC, Way(alone=True), seed=8)
    restored = checkpoint.load(folder, model, opt)
    assert named == f"{step_directory(folder, restored.step).name}\n"
    differing = bits_differing(whole(model, opt), {OLD: old, NEW: new}[restored.step])
    train(model, opt, SPEC, restored.step, restored.step + 1)
    checkpoint.save(folder, model, opt, step=restored.step + 1, keep=2)
    assert debris(folder) == []
    for path in folder.glob("step_*"):
        assert checkpoint.verify(path).step == int(path.name[5:])
    again, fresh = build(SPEC, Way(alone=True), seed=8)
    assert checkpoint.load(folder, again, fresh).step == restored.step + 1
    assert bits_differing(whole(again, fresh), whole(model, opt)) == 0
    return restored.step, differing


@cache
def watch(origin: Path, world: int) -> list[list[tuple[str, str]]]:
    """What each rank does to files in an undisturbed save, and where it votes."""
    with TemporaryDirectory() as name:
        folder = Path(shutil.copytree(origin, Path(name) / "copy"))
        return values(run_forked(save_and_die, folder, [], -1, world=world))


def kill(
    before: tuple[Path, Whole, Whole], world: int, victims: list[int], die_at: int
) -> tuple[int, int, list[Answer]]:
    """Kill at one event; the step found, bits that differ, and how the processes ended."""
    with TemporaryDirectory() as name:
        folder = Path(shutil.copytree(before[0], Path(name) / "copy"))
        answers = run_forked(save_and_die, folder, victims, die_at, world=world)
        # The first to die may take others with it.
        assert -signal.SIGKILL in [answers[rank].exitcode for rank in victims], answers
        return *examine(folder, *before[1:]), answers


def check_all(before: tuple[Path, Whole, Whole], world: int, victim: int, events: list[tuple[str, str]]) -> str:
    """Kill before every event of a rank; LATEST is the only thing that decides what a restart finds."""
    replaced = [number for number, event in enumerate(events) if event == ("os.rename", LATEST)]
    assert len(replaced) == (1 if victim == 0 else 0)
    steps = []
    # Nothing is different on the disk before and after something is read.
    changing = [number for number, (event, _) in enumerate(events) if event not in ("read", "fsync done", "vote")]
    for number in [*changing, len(events) - 1]:
        step, differing, _ = kill(before, world, [victim], number)
        assert differing == 0, (number, events[number])
        # When a rank that only votes dies, rank 0 may just have replaced LATEST.
        assert step == (NEW if replaced and number > replaced[0] else OLD) or not replaced, (number, events[number])
        steps.append(step)
    return f"{len(steps)} kills at different points: a whole step each time, {steps.count(OLD)} times the previous one"


@pytest.mark.timeout(300)
@pytest.mark.fault("F4")
def test_killed_before_everything_that_one_rank_does_to_a_file(before: Any, figure: Figure) -> None:
    (events,) = watch(before[0], 1)
    figure("1 rank: " + check_all(before, 1, 0, events))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.fault("F4")
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_ranks_killed_before_everything_that_it_does_to_a_file(
    before: Any, victim: int, figure: Figure
) -> None:
    events = watch(before[0], 2)
    figure(f"rank {victim} of 2: " + check_all(before, 2, victim, events[victim]))


POINTS = {
    "a shard is opened": ("open", "shard-"),
    "a shard is synchronized": ("fsync", "shard-"),
    "a shard is hashed": ("read", "shard-"),
    "the manifest is written": ("open", "manifest.json"),
    "the manifest is synchronized": ("fsync", "manifest.json"),
    "the last vote before the name": ("vote", ""),
    "the step gets its name": ("os.rename", f"step_{NEW:08d}"),
    "LATEST is replaced": ("os.rename", LATEST),
}


def find(point: str, events: list[tuple[str, str]]) -> int | None:
    """Number of the event before which a point lies, on a rank that has such a point."""
    kind, part = POINTS[point]
    found = [number for number, (event, path) in enumerate(events) if event == kind and part in path]
    if kind == "vote":
        name = ("os.rename", f"step_{NEW:08d}")
        # The ranks that do not rename vote as often: after the rename, and after LATEST.
        return max(n for n in found if n < events.index(name)) if name in events else found[-3]
    return found[0] if found else None


def kill_at(before: Any, point: str, seed: int) -> tuple[int, int]:
    """Seeds are worlds, victims, and before or after the event."""
    world, victims, after = [(1, [0], 0), (2, [0], 0), (1, [0], 1), (2, [1], 0), (2, [0, 1], 1)][seed]
    ranks = watch(before[0], world)
    number = find(point, ranks[victims[0]])
    if number is None:
        victims, number = [0], find(point, ranks[0])
    assert number is not None
    step, differing, _ = kill(before, world, victims, number + after)
    assert (step == NEW) == (point == "LATEST is replaced" and after == 1), (step, point)
    return step, differing


@pytest.mark.fault("F4")
@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n == 1 else [pytest.mark.soak]) for n in range(5)])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(before: Any, point: str, seed: int, figure: Figure) -> None:
    step, differing = kill_at(before, point, seed)
    figure(
        f"killed where {point}, seed {seed}: step {step} loads, {differing} bits differ, debris gone at the next save"
    )
    assert differing == 0


@pytest.mark.fault("F4")
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]], ids=str)
def test_ranks_killed_in_the_middle(before: Any, victims: list[int], figure: Figure) -> None:
    """The survivor does not wait for ever, and does not believe that the step is saved."""
    events = watch(before[0], 2)
    number = len(events[victims[0]]) // 3
    started = time.monotonic()
    step, differing, answers = kill(before, 2, victims, number)
    seconds = time.monotonic() - started
    assert (step, differing) == (OLD, 0)
    survivors = [answer for rank, answer in enumerate(answers) if rank not in victims]
    assert all(answer.exitcode == 1 and "Error" in answer.error for answer in survivors), survivors
    assert seconds < 30
    figure(
        f"ranks {victims} of 2 killed in a save: previous step loads, {differing} bits differ, over in {seconds:.1f} s"
    )


def die_later(rank: int, world: int, folder: Path, delay: float) -> None:
    """Die after a while, wherever the save is then."""
    model, opt = build(SPEC, Way(world))
    checkpoint.load(folder, model, opt)
    train(model, opt, SPEC, OLD, NEW, rank, world)
    signal.signal(signal.SIGALRM, lambda *_: tracing.die())
    signal.setitimer(signal.ITIMER_REAL, delay)
    checkpoint.save(folder, model, opt, step=NEW, keep=2)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.fault("F4")
def test_killed_at_any_time(before: Any, figure: Figure) -> None:
    steps = []
    for number in range(60):
        with TemporaryDirectory() as name:
            folder = Path(shutil.copytree(before[0], Path(name) / "copy"))
            run_forked(die_later, folder, 0.0005 * (number + 1))
            step, differing = examine(folder, *before[1:])
            assert differing == 0
            steps.append(step)
    assert OLD in steps
    figure(f"{len(steps)} kills at any time, {steps.count(OLD)} before LATEST was replaced: 0 bits differ")


@pytest.mark.fault("F4")
@pytest.mark.parametrize("world", [1, 2])
def test_everything_is_on_disk_before_it_is_named(before: Any, world: int, figure: Figure) -> None:
    """A power cut loses what was not synchronized, and may reorder the rest."""
    ranks = watch(before[0], world)
    written = [{path for event, path in events if event == "open"} for events in ranks]
    for events, own in zip(ranks, written, strict=True):
        for path in own:
            assert ("fsync done", path) in events, f"{path} is written and not synchronized"
            assert events.index(("fsync done", path)) > events.index(("open", path))
            if path.startswith("step_"):
                after = events[events.index(("open", path)) :]
                assert ("fsync done", str(Path(path).parent)) in after, "its name in the directory is not"
    events = ranks[0]
    (published,) = [n for n, event in enumerate(events) if event == ("os.rename", step_directory(Path(), NEW).name)]
    (named,) = [n for n, event in enumerate(events) if event == ("os.rename", LATEST)]
    synced = {path: n for n, (event, path) in enumerate(events) if event == "fsync done"}
    folders = {path for path in synced if path.startswith(f"step_{NEW:08d}.tmp-") and "/" not in path}
    assert folders, "the directory is synchronized before it gets its name"
    assert all(synced[path] < published for path in folders)
    assert all(synced[path] < published for path in written[0] if path.startswith("step_"))
    syncs_of_parent = [n for n, event in enumerate(events) if event == ("fsync done", ".")]
    assert any(published < n < named for n in syncs_of_parent), "the name is on disk before LATEST has it"
    assert any(n > named for n in syncs_of_parent)
    removed = [n for n, (event, path) in enumerate(events) if event in ("os.remove", "os.rmdir") and "0001" in path]
    assert all(n > max(syncs_of_parent) or n > named for n in removed), "old steps go last"
    figure(
        f"{world} ranks: {sum(map(len, written))} of {sum(map(len, written))} files synchronized before they are named"
    )
