"""Saving behind the training: the moment of the call is what is saved, and a failure is never lost."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distmuon import checkpoint
from distmuon.errors import CheckpointError
from tests.checkpoint.disk import LATEST, debris, step_directory
from tests.checkpoint.forked import run_forked, values
from tests.checkpoint.scene import SMALL, Figure, Spec, Way, Whole, bits_differing, build, train, whole

SPEC = Spec(SMALL, dtype="bfloat16")
ALONE = Way(alone=True)


def slow(call: Callable[..., Any], gate: threading.Event) -> Callable[..., Any]:
    """The call, once the gate is open."""

    def wait(*args: Any) -> Any:
        assert gate.wait(30)
        return call(*args)

    return wait


def load(folder: Path, step: int | None = None) -> tuple[int, Whole]:
    model, opt = build(SPEC, ALONE, seed=8)
    restored = checkpoint.load(folder, model, opt, step=step)
    return restored.step, whole(model, opt)


def test_the_moment_of_the_call_is_saved(tmp_path: Path) -> None:
    """Writing begins when training is three steps further."""
    model, opt = build(SPEC, ALONE)
    gate = threading.Event()
    with mock.patch.object(os, "fsync", slow(os.fsync, gate)), checkpoint.Saver(tmp_path, model, opt) as saver:
        train(model, opt, SPEC, 0, 2)
        saved, noise = whole(model, opt), torch.get_rng_state()
        extra = {"list": [1]}
        started = time.monotonic()
        saver.save(2, extra)
        assert time.monotonic() - started < 5
        extra["list"].append(2)
        torch.rand(3)
        for group in opt.param_groups:
            group["lr"] = 0.5
        train(model, opt, SPEC, 2, 5)
        assert not (tmp_path / LATEST).exists()
        gate.set()
        saver.wait()
        step, found = load(tmp_path)
    assert (step, bits_differing(found, saved)) == (2, 0)
    assert bits_differing(whole(model, opt), saved) > 0
    again, fresh = build(SPEC, ALONE, seed=8)
    assert checkpoint.load(tmp_path, again, fresh).extra == {"list": [1]}
    assert fresh.param_groups[0]["lr"] == 0.125
    assert torch.equal(torch.get_rng_state(), noise)


def test_leaving_the_block_waits(tmp_path: Path) -> None:
    model, opt = build(SPEC, ALONE)
    with checkpoint.Saver(tmp_path, model, opt, keep=2) as saver:
        for step in range(4):
            train(model, opt, SPEC, step, step + 1)
            saver.save(step)
    assert load(tmp_path)[0] == 3
    assert bits_differing(load(tmp_path)[1], whole(model, opt)) == 0
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]
    assert not [thread for thread in threading.enumerate() if "checkpoint" in thread.name]


def fails(*_: Any) -> Any:
    raise OSError(errno.EIO, "Input/output error")


CALLS: dict[str, Callable[[checkpoint.Saver], object]] = {
    "save": lambda saver: saver.save(3),
    "wait": lambda saver: saver.wait(),
    "leaving": lambda saver: saver.__exit__(None, None, None),
    "in the foreground": lambda saver: saver.save(2, background=False),
}


@pytest.mark.fault("F5")
@pytest.mark.parametrize("by", CALLS)
def test_a_failure_behind_the_training_is_raised_next(tmp_path: Path, by: str, figure: Figure) -> None:
    model, opt = build(SPEC, ALONE)
    saver = checkpoint.Saver(tmp_path, model, opt)
    saver.save(1, background=False)
    with mock.patch.object(os, "fsync", fails):
        if by != "in the foreground":
            saver.save(2)
        for thread in threading.enumerate():
            if thread.name == "distmuon-checkpoint":
                thread.join()
        with pytest.raises(CheckpointError, match="Input/output error"):
            CALLS[by](saver)
    assert load(tmp_path)[0] == 1
    saver.wait()
    saver.save(4, background=False)
    assert load(tmp_path)[0] == 4
    assert debris(tmp_path) == []
    figure(f"a failed background save is raised by {by}, the step before stays, the next one succeeds")


def test_an_error_in_the_block_is_what_is_seen(tmp_path: Path) -> None:
    """A failed save does not hide it, and a save under way is finished."""
    model, opt = build(SPEC, ALONE)
    saver = checkpoint.Saver(tmp_path, model, opt)
    saver.save(1)
    problem = ZeroDivisionError("mine")
    saver.__exit__(ZeroDivisionError, problem, None)
    assert load(tmp_path)[0] == 1


def behind(rank: int, world: int, folder: str) -> tuple[int, int]:
    """Training and saving at the same time on processes: their collectives must not meet."""
    model, opt = build(SPEC, Way(world, "flat"))
    saved = []
    with checkpoint.Saver(folder, model, opt) as saver:
        for step in range(6):
            train(model, opt, SPEC, step, step + 1, rank, world)
            saved.append(whole(model, opt))
            saver.save(step)
    straight, twin = build(SPEC, Way(world, "flat"))
    train(straight, twin, SPEC, 0, 6, rank, world)
    differing = bits_differing(whole(straight, twin), saved[-1])
    wrong = 0
    for step, state in enumerate(saved):
        again, fresh = build(SPEC, Way(world), seed=8)
        checkpoint.load(folder, again, fresh, step=step)
        wrong += bits_differing(whole(again, fresh), state)
    assert sum(bits_differing(state, saved[0]) > 0 for state in saved) == 5
    return differing, wrong


def test_saving_and_training_at_the_same_time(tmp_path: Path) -> None:
    assert values(run_forked(behind, str(tmp_path), world=2)) == [(0, 0)] * 2


def one_rank_fails(rank: int, world: int, folder: str) -> tuple[str, int, str]:
    """Rank 1's disk breaks behind the training."""
    model, opt = build(SPEC, Way(world))
    saver = checkpoint.Saver(folder, model, opt)
    saver.save(1, background=False)
    message = ""
    with mock.patch.object(os, "fsync", fails if rank == 1 else os.fsync):
        saver.save(2)
        train(model, opt, SPEC, 0, 3, rank, world)
        try:
            saver.wait()
        except CheckpointError as error:
            message = str(error)
    saver.save(3, background=False)
    again, fresh = build(SPEC, Way(world), seed=8)
    named = Path(folder, LATEST).read_text()
    return message, checkpoint.load(folder, again, fresh).step, named


@pytest.mark.fault("F5")
def test_a_rank_that_fails_behind_the_training(tmp_path: Path, figure: Figure) -> None:
    answers = values(run_forked(one_rank_fails, str(tmp_path), world=2))
    assert len({message for message, _, _ in answers}) == 1
    for message, step, named in answers:
        assert "rank 1" in message
        assert (step, named) == (3, "step_00000003\n")
    figure("rank 1's disk breaks behind the training: same error on 2 of 2 ranks, the next save succeeds")


def forever(rank: int, world: int, folder: str) -> None:
    """End the interpreter with a save under way."""
    model, opt = build(SPEC, ALONE)
    saver = checkpoint.Saver(folder, model, opt)
    saver.save(1)
    threading._shutdown()  # type: ignore[attr-defined]


def test_an_interpreter_that_ends_finishes_its_save(tmp_path: Path) -> None:
    values(run_forked(forever, str(tmp_path)))
    assert load(tmp_path)[0] == 1


def rivals(rank: int, world: int, folder: str, number: int) -> list[str]:
    """Save steps into a directory that another run saves into as well."""
    model, opt = build(SPEC, ALONE, seed=number)
    seen = []
    for step in range(number, 30, 2):
        train(model, opt, SPEC, step, step + 1)
        try:
            checkpoint.save(folder, model, opt, step=step)
            seen.append("")
        except CheckpointError as error:
            seen.append(str(error))
    return seen


def test_two_runs_in_one_directory_never_break_a_step(tmp_path: Path) -> None:
    """One may be refused; whatever is there under its name is whole."""
    answers: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: run_forked(rivals, str(tmp_path), n)})) for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [message for number in (1, 2) for message in values(answers[number])[0]]
    assert "" in seen
    for path in tmp_path.glob("step_????????"):
        checkpoint.verify(path)
    assert load(tmp_path)[0] >= 1
    assert step_directory(tmp_path, load(tmp_path)[0]).exists()
