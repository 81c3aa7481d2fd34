"""Ranks that disagree about how many they are; other disagreements are in tests/distributed/test_mismatch.py."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

import distmuon
from distmuon.errors import RankMismatchError
from tests.ranks import run_threads


@pytest.mark.fault("F15")
@pytest.mark.parametrize("world", [2, 4])
def test_expert_groups_of_different_sizes(world: int, figure: Callable[[str], None]) -> None:
    """One rank takes its experts for replicated on all ranks, as with another ep_size; the others do not."""

    def body(rank: int, ranks: int) -> tuple[str, float]:
        alone = [dist.new_group([other]) for other in range(ranks)]
        everybody = dist.new_group(list(range(ranks)))
        group = everybody if rank == 0 else alone[rank]
        w, e = Parameter(torch.zeros(4, 4)), Parameter(torch.zeros(4, 4))
        groups = [{"params": [("w", w)], "kind": "muon"}]
        groups += [{"params": [("e", e)], "kind": "muon", "expert_group": "ep"}]
        start = time.monotonic()
        with pytest.raises(RankMismatchError) as caught:
            distmuon.DistMuon(groups, expert_groups={"ep": group})
        return str(caught.value), time.monotonic() - start

    results = run_threads(world, body, timeout=5.0)
    slowest = max(seconds for _, seconds in results)
    figure(f"expert groups of {world} ranks and of 1: {world} of {world} ranks raise within {1000 * slowest:.0f} ms")
    assert slowest < 2.0
    assert len({message for message, _ in results}) == 1
    assert "ep" in results[0][0]
