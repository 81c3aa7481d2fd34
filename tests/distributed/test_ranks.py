"""The test machinery itself: both kinds of ranks run the collectives a product uses and report failures."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, RankPool, run_threads


def collectives(rank: int, world: int, group: Any = None) -> list[float]:
    """A checksum per collective, each computable by hand."""
    sums = []
    full = torch.arange(2.0 * world) + rank
    piece = torch.empty(2)
    dist.reduce_scatter_single(piece, full, group=group, async_op=True).wait()
    sums.append(float(piece.sum()))
    everything = torch.empty(2 * world)
    dist.all_gather_single(everything, piece, group=group, async_op=True).wait()
    sums.append(float(everything.sum()))
    own = full[2 * rank : 2 * rank + 2]
    dist.reduce_scatter_single(own, full, group=group)
    sums.append(float(own.sum()))
    double = torch.full((2,), 2.0**-40 + rank, dtype=torch.float64)
    dist.all_reduce(double, group=group, async_op=True).wait()
    sums.append(float(double[0]))
    send, receive = [rank + 1] * world, [source + 1 for source in range(world)]
    out = torch.empty(sum(receive))
    dist.all_to_all_single(out, torch.full((sum(send),), float(rank)), receive, send, group=group)
    sums.append(float(out.sum()))
    lists = [torch.empty(1) for _ in range(world)]
    dist.all_gather(lists, torch.tensor([float(rank)]), group=group)
    sums.append(float(sum(lists)))
    names: list[Any] = [None] * world
    dist.all_gather_object(names, {"rank": rank}, group=group)
    sums.append(float(sum(name["rank"] for name in names)))
    low = torch.tensor([rank, -rank])
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    sums.append(float(low.sum()))
    return sums


def expected(rank: int, world: int) -> list[float]:
    ranks = world * (world - 1) / 2
    mine = world * (4 * rank + 1) + 2 * ranks
    everything = sum(world * (4 * other + 1) + 2 * ranks for other in range(world))
    swapped = sum(other * (other + 1) for other in range(world))
    return [mine, everything, mine, world * 2.0**-40 + ranks, swapped, ranks, ranks, float(1 - world)]


def fail_on_last(rank: int, world: int, group: Any = None) -> None:
    if rank == world - 1:
        raise ValueError("the last rank fails")
    dist.all_reduce(torch.ones(1), group=group)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_collectives(world: int, pool: RankPool) -> None:
    want = [expected(rank, world) for rank in range(world)]
    assert run_threads(world, collectives) == want
    assert pool.run(world, collectives) == want


def test_thread_failure_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 2 of 3:(.|\n)*the last rank fails"):
        run_threads(3, fail_on_last)
    assert time.monotonic() - start < 5.0
    assert run_threads(2, collectives) == [expected(0, 2), expected(1, 2)]


def test_thread_subgroup() -> None:
    def body(rank: int, world: int) -> float:
        group = dist.new_group([0, 2])
        value = torch.tensor([float(rank)])
        if rank != 1:
            dist.all_reduce(value, group=group)
        return float(value)

    assert run_threads(3, body) == [2.0, 1.0, 2.0]
