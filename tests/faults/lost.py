"""Training that loses a rank, and what the other ranks say about it; for the tests of deaths and of hangs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch.distributed as dist

from distmuon.errors import CollectiveError, SynchronizationError
from tests.distributed.scenario import SMALL_MB, Case, backward, gradients, optimizer, parameters
from tests.faults.launch import Ending, die, freeze, run_ranks, strike, tell

POINTS = {
    "before reduce": ("distmuon.comm.Group.reduce_scatter", False),
    "after reduce": ("distmuon.reducer.Reducer.finish", True),
    "in Newton-Schulz": ("distmuon.pipeline.orthogonalize_by_shape", False),
    "in gather": ("distmuon.comm.Group.all_gather", False),
}
"""Where a rank is lost: the function, and whether after it."""

MAY_SAY = {
    "before reduce": {"reduce"},
    "after reduce": {"guard"},
    "in Newton-Schulz": {"complete", "newton_schulz", "gather"},
    "in gather": {"complete", "newton_schulz", "gather"},
}
"""The phases that other ranks are in when they miss it: a rank may be a collective ahead."""

STEPS = 4


def train(rank: int, world: int, group: Any, lose: dict[str, Any]) -> dict[str, Any]:
    """Train until a rank is lost; plain facts about the error, and about the threads that it leaves."""
    lost: dict[str, float] = {}
    # A busy machine may bring a rank to the collective long after the one that is lost there.
    there: dict[str, float] = {"there_at": 0.0}
    actions: dict[str, Callable[[], None]] = {"die": die, "freeze": freeze, "skip": lambda: time.sleep(lose["away"])}

    def act() -> None:
        lost["lost_at"] = time.monotonic()
        tell(lost)
        actions[lose["action"]]()

    def arrive() -> None:
        there["there_at"] = time.monotonic()

    case = Case(policy=lose["policy"], clip=1.0, bucket_mb=lose.get("bucket_mb", SMALL_MB))
    params = parameters()
    try:
        with store(rank, world, lose.get("port")):
            opt = optimizer(params, case)
            for step in range(STEPS):
                target, after = POINTS[lose["point"]]
                do = act if rank == lose["rank"] else arrive
                here = step == lose["step"]
                with strike(target, do, lose.get("call", 1), after) if here else contextlib.nullcontext():
                    backward(params, gradients(case, step, 0, rank, world))
                    opt.step()
                    opt.zero_grad()
    except CollectiveError as error:
        at = time.monotonic()
        with contextlib.suppress(CollectiveError, SynchronizationError):
            opt.step()
        again = time.monotonic() - at
        while exchanges() and time.monotonic() < at + 1.0:
            time.sleep(0.01)
        facts = {"text": str(error), "gone": error.gone, "silent": error.silent, "threads": exchanges()}
        verdict = {**lost, **there, **facts, "at": at, "again": again, "cause": type(error.__cause__).__name__}
        tell(verdict)
        time.sleep(lose.get("linger", 0.0))
        return verdict
    return {"text": "no error"}


def exchanges() -> int:
    """Threads that wait for messages."""
    return sum(thread.name == "distmuon-exchange" for thread in threading.enumerate())


@contextlib.contextmanager
def store(rank: int, world: int, port: int | None) -> Any:
    """With a port, ranks report to a store that rank 0 has, as without torchrun, and not to a file."""
    if port is None:
        yield
        return
    made = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    with mock.patch("torch.distributed.distributed_c10d._get_default_store", return_value=made):
        yield


def lose(world: int, timeout: float = 20.0, **how: Any) -> tuple[float, list[Ending]]:
    """When a rank was lost, and how all ended; one that skips is back a while after the others gave up."""
    endings = run_ranks(world, train, {**how, "away": timeout + 1.5}, group_timeout=timeout, timeout=60.0)
    told = endings[how["rank"]].verdict
    assert "lost_at" in told, (how, endings)
    return told["lost_at"], endings


def check(endings: Sequence[Ending], lost: int, step: int, point: str) -> None:
    """Every other rank said where it was, had one cause, left no thread, and ended."""
    for rank, ending in enumerate(endings):
        if rank != lost:
            said = ending.verdict
            assert said["text"].startswith(f"step {step}, "), said
            assert any(f'phase "{phase}"' in said["text"] for phase in MAY_SAY[point]), said
            assert point == "after reduce" or "bucket" in said["text"], said
            assert "restart all ranks" in said["text"]
            assert said["threads"] == 0, said
            assert said["again"] < 0.5, "who steps again is told at once"
            assert (said["cause"], ending.exit_code) == ("RuntimeError", 0), said
