"""The tracer of the benchmarks counts what reaches torch's communication library, also from C++."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmuon.benchmarks.launch import sent_bytes
from distmuon.benchmarks.tracer import Tracer
from tests.ranks import RankPool

N = 600
BYTES = 4.0 * N
# Collective -> (name in the tally, bytes that each of three ranks sends in a ring).
EXPECTED = {
    "all_reduce": ("allreduce", 2 * BYTES * 2 / 3),
    "reduce": ("reduce", BYTES * 2 / 3),
    "broadcast": ("broadcast", BYTES * 2 / 3),
    "all_gather": ("allgather", BYTES * 2 / 3),
    "all_gather_single": ("allgather_base", BYTES * 2 / 3),
    "reduce_scatter_single": ("reduce_scatter_base", BYTES * 2 / 3),
    "all_to_all_single": ("alltoall_base", BYTES * 2 / 3),
    "uneven all_to_all_single": ("alltoall_base", None),
    "barrier": (None, 0.0),
    "alone": (None, 0.0),
}


def issue(kind: str, rank: int, world: int, group: dist.ProcessGroup) -> None:
    full, shard = torch.ones(N), torch.ones(N // world)
    if kind in ("reduce", "broadcast"):
        getattr(dist, kind)(full, 0, group=group)
    elif kind == "all_gather":
        dist.all_gather(list(full.chunk(world)), shard, group=group)
    elif kind == "reduce_scatter_single":
        dist.reduce_scatter_single(shard, full, group=group)
    elif kind == "all_gather_single":
        dist.all_gather_single(full, shard, group=group)
    elif kind == "all_to_all_single":
        dist.all_to_all_single(torch.empty(N), full, group=group)
    elif kind == "uneven all_to_all_single":
        # Everybody keeps 100 elements and sends 1 to rank 0, 2 to rank 1 and so on.
        counts = [100 if peer == rank else peer + 1 for peer in range(world)]
        received = [100 if peer == rank else rank + 1 for peer in range(world)]
        dist.all_to_all_single(torch.empty(sum(received)), full[: sum(counts)], received, counts, group=group)
    elif kind == "alone":
        dist.all_reduce(full, group=dist.new_group([rank], use_local_synchronization=True))
    else:
        dist.barrier(group) if kind == "barrier" else dist.all_reduce(full, group=group)


def count(rank: int, world: int, group: dist.ProcessGroup, kind: str) -> tuple[dict[str, int], dict[str, float], Any]:
    with Tracer() as tracer:
        issue(kind, rank, world, group)
    issue("all_reduce", rank, world, group)
    return tracer.tally.calls, tracer.tally.wire, tracer.tally.large_calls


@pytest.mark.parametrize("kind", EXPECTED)
def test_bytes(pool: RankPool, kind: str) -> None:
    name, wire = EXPECTED[kind]
    for rank, (calls, sent, large) in enumerate(pool.run(3, count, kind)):
        wire_here = 4.0 * (6 - rank - 1) if wire is None else wire
        assert calls == ({name: 1} if name else {})
        assert sent == ({name: pytest.approx(wire_here)} if name else {})
        assert large == ({name: 1} if name and wire_here > 1024 else {})


def from_cpp(rank: int, world: int, group: dist.ProcessGroup) -> dict[str, float]:
    layer = torch.nn.Linear(40, 20, bias=False)
    wrapped = torch.nn.parallel.DistributedDataParallel(layer, process_group=group)
    with Tracer() as tracer:
        wrapped(torch.ones(2, 40)).sum().backward()
    return tracer.tally.wire


def test_the_reducer_of_ddp_is_seen(pool: RankPool) -> None:
    assert pool.run(2, from_cpp) == [{"allreduce": 4 * 800}] * 2


def through_loopback(rank: int, world: int, group: dist.ProcessGroup) -> int:
    return sent_bytes(lambda: dist.all_reduce(torch.ones(500_000)))


def test_what_leaves_is_about_what_the_ring_says(pool: RankPool) -> None:
    # All ranks of the pool together; others may send at the same time, so only the lower edge is sharp.
    for sent in pool.run(4, through_loopback):
        assert 4 * 2_000_000 * 2 * 3 / 4 * 0.99 < sent < 4 * 2_000_000 * 2 * 3 / 4 * 3
