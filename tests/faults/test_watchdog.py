"""A rank whose steps stop coming leaves the stacks of its threads behind, and so does every rank that waits for it."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmuon.errors import ConfigError
from distmuon.watchdog import Watchdog
from tests.faults.launch import run_ranks

LEAST = 0.3


def stall_here(seconds: float) -> None:
    """Long enough for every watchdog; its name is looked for in the stacks."""
    time.sleep(seconds)


def hold_the_interpreter(seconds: float) -> None:
    """Stall without letting another Python thread run: one long comparison of C code after the other."""
    import re

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        re.match("(a?){18}a{18}", "a" * 18)


def test_a_good_run_leaves_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "new", 3, LEAST) as dog:
        for step in range(5):
            time.sleep(0.1)
            dog.beat(step)
        assert dog.path == tmp_path / "new" / "stacks-rank3.txt"
    assert list((tmp_path / "new").iterdir()) == []
    time.sleep(LEAST + 0.1)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("stall", [stall_here, hold_the_interpreter])
def test_a_stall_is_written_with_all_threads(stall: Callable[[float], None], tmp_path: Path) -> None:
    gate = threading.Event()
    other = threading.Thread(target=gate.wait, name="other")
    other.start()
    with Watchdog(tmp_path, 0, LEAST) as dog:
        for step in range(40, 43):
            dog.beat(step)
        stall(2 * LEAST)
        dog.beat(43)
    gate.set()
    other.join()
    text = dog.path.read_text()
    assert text.startswith("process ")
    assert text.count(f"no step ended for {LEAST} s after step 42, counted from 20") == 1
    assert stall.__name__ in text
    assert text.count("Thread 0x") + text.count("Current thread 0x") >= 2
    assert "gate.wait" in text or "threading.py" in text


def test_stacks_of_every_stall_stay(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, LEAST) as dog:
        for step in range(6):
            dog.beat(step)
            stall_here(LEAST + 0.2 if step in (0, 5) else 0.0)
    text = dog.path.read_text()
    assert text.count("in stall_here") == 2
    assert "after step 0" in text
    assert "after step 5" in text
    assert text.count("after step") == 2


def test_the_limit_follows_the_steps(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0.05, factor=4.0) as dog:
        assert dog.limit == 0.05
        for step in range(5):
            time.sleep(0.2)
            dog.beat(step)
            with dog.paused():
                time.sleep(0.5)
    # The first interval is before the first step; what is paused counts for no step.
    assert 0.8 <= dog.limit < 1.6


def test_a_pause_is_not_watched(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, LEAST) as dog:
        dog.beat(0)
        with dog.paused():
            time.sleep(2 * LEAST)
        dog.beat(1)
    assert not dog.path.exists()
    with dog.paused():
        pass
    dog.beat(2)
    assert not dog.path.exists()


@pytest.mark.parametrize("wrong", [{"least_seconds": 0.0}, {"least_seconds": float("nan")}, {"factor": 1.0}])
def test_numbers_are_checked(wrong: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Watchdog(tmp_path, 0, **wrong)


def train_with_a_stall(rank: int, world: int, group: Any, folder: str) -> float:
    """Step together; in step 5 rank 1 stalls, and the others wait for it. Seconds of the others' wait."""
    begun = 0.0
    with Watchdog(Path(folder), rank, LEAST) as dog:
        for step in range(8):
            begun = time.monotonic() if step == 5 else begun
            if (rank, step) == (1, 5):
                stall_here(4 * LEAST)
            dist.all_reduce(torch.ones(8), group=group)
            dog.beat(step)
            if step == 5:
                waited = time.monotonic() - begun
    return waited


@pytest.mark.fault("F24")
def test_one_file_a_rank(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """All ranks say where they are: the one that stalls in its own code, the others in the collective."""
    world = 4
    endings = run_ranks(world, train_with_a_stall, str(tmp_path))
    assert [ending.exit_code for ending in endings] == [0] * world
    files = sorted(tmp_path.glob("stacks-*.txt"))
    assert [file.name for file in files] == [f"stacks-rank{rank}.txt" for rank in range(world)]
    texts = [file.read_text() for file in files]
    assert all("after step 4, counted from" in text for text in texts)
    assert [rank for rank in range(world) if "in stall_here" in texts[rank]] == [1]
    assert all("in all_reduce" in texts[rank] for rank in (0, 2, 3))
    figure(
        f"rank 1 of {world} stalled for {4 * LEAST:.1f} s: {len(files)} files of stacks, one a rank, headed by the "
        f"step, at {LEAST} s; only rank 1's showed its own code, the others' the collective; all {world} ranks went on"
    )


@pytest.mark.fault("F24")
def test_a_beat_costs_little(tmp_path: Path, figure: Callable[[str], None]) -> None:
    seconds = []
    with Watchdog(tmp_path, 0) as dog:
        for step in range(300):
            begun = time.perf_counter()
            dog.beat(step)
            seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    figure(f"a beat takes {median * 1e6:.0f} us (median of {len(seconds)})")
    assert median < 2e-3
