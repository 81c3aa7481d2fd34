"""The launcher itself: deaths, stops, verdicts, and nothing left behind."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.launch import StuckError, die, freeze, rank_command, run_ranks, run_torchrun, strike, tell


def act(rank: int, world: int, group: Any, action: str) -> Any:
    """Rank 1 dies, stops, fails or goes on; the others say who they are and the sum of the ranks' numbers."""
    total = torch.tensor(rank)
    dist.all_reduce(total, group=group)
    tell({"pid": os.getpid(), "sum": int(total)})
    if rank == 1 and action in ("die", "freeze"):
        with strike("os.getcwd", {"die": die, "freeze": freeze}[action], call=2):
            os.getcwd()
            os.getcwd()
    if rank == 1 and action == "fail":
        raise RuntimeError("as told")
    if action == "hang":
        time.sleep(60)
    return None


@pytest.mark.parametrize(("action", "code"), [("go on", 0), ("die", -9), ("freeze", -9), ("fail", 1)])
def test_endings(action: str, code: int) -> None:
    begun = time.monotonic()
    endings = run_ranks(3, act, action)
    assert [ending.exit_code for ending in endings] == [0, code, 0]
    assert all(ending.seconds > 0 and begun < ending.ended < time.monotonic() for ending in endings)
    assert [endings[rank].verdict["sum"] for rank in (0, 2)] == [3, 3]
    assert ("as told" in str(endings[1].verdict)) == (action == "fail")


def test_stuck_ranks_are_killed() -> None:
    with pytest.raises(StuckError, match=r"ranks \[0, 1\] of 2 still ran") as stuck:
        run_ranks(2, act, "hang", timeout=3.0)
    pids = re.findall(r"'pid': (\d+)", str(stuck.value))
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_torchrun_restarts_and_tells() -> None:
    launched = run_torchrun(["--standalone", "--nproc-per-node=2", *rank_command(act, "go on")])
    assert launched.exit_code == 0, launched.output
    assert {rank: verdict["sum"] for rank, verdict in launched.verdicts.items()} == {0: 1, 1: 1}
