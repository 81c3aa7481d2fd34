"""The placement policies: how runs of elements are dealt out to the shards of a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Run(NamedTuple):
    """Consecutive elements of one parameter; a cost above zero marks a matrix, which is best kept whole."""

    param: int
    start: int
    length: int
    cost: int


class Piece(NamedTuple):
    """Consecutive elements of one parameter and where they lie in a rank's shard of a bucket."""

    param: int
    start: int
    length: int
    offset: int

    @property
    def end(self) -> int:
        """First element after the piece, counted within the parameter."""
        return self.start + self.length


# Per rank the pieces of its shard, and the length of every shard.
Shards = tuple[list[list[Piece]], int]


def place_flat(params: Iterable[list[Run]], world: int, bucket_numel: int) -> Iterator[Shards]:
    """Cut buckets of consecutive parameters into equal contiguous shards, as ZeRO-1 does.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        world: number of ranks.
        bucket_numel: elements after which a bucket is closed.

    Yields:
        Pieces per rank and shard length, one pair a bucket.
    """
    for runs in _batches(params, bucket_numel):
        yield _pour([[] for _ in range(world)], runs, _shard_numel(runs, world))


def place_balanced(params: Iterable[list[Run]], world: int, bucket_numel: int) -> Iterator[Shards]:
    """Keep matrices whole, spread their cost over the ranks, level the shards with elementwise runs.

    Longest processing time first under a cap of the shard length, with the load carried from bucket to bucket. A bucket
    that cannot be levelled takes further parameters; in the last one, matrices that fit nowhere are cut.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        world: number of ranks.
        bucket_numel: elements after which a bucket is closed.

    Yields:
        Pieces per rank and shard length, one pair a bucket.
    """
    loads = [0] * world
    pending: list[Run] = []
    for runs in _batches(params, bucket_numel):
        pending += runs
        placed, rest, new_loads = _longest_first(pending, loads)
        if not any(run.cost for run in rest):
            yield _pour(placed, rest, _shard_numel(pending, world))
            loads, pending = new_loads, []
    if pending:
        placed, rest, _ = _longest_first(pending, loads)
        yield _pour(placed, rest, _shard_numel(pending, world))


def _batches(params: Iterable[list[Run]], bucket_numel: int) -> Iterator[list[Run]]:
    batch: list[Run] = []
    for runs in params:
        batch.extend(runs)
        if batch and sum(run.length for run in batch) >= bucket_numel:
            yield batch
            batch = []
    if batch:
        yield batch


def _shard_numel(runs: list[Run], world: int) -> int:
    return -(-sum(run.length for run in runs) // world)


def _longest_first(runs: list[Run], loads: list[int]) -> tuple[list[list[Run]], list[Run], list[int]]:
    """Give each matrix to the least loaded rank with room; return whole runs per rank, the rest, and the new loads."""
    world, cap = len(loads), _shard_numel(runs, len(loads))
    loads, used = list(loads), [0] * world
    placed: list[list[Run]] = [[] for _ in range(world)]
    rest = [run for run in runs if not run.cost]
    for run in sorted((run for run in runs if run.cost), key=lambda run: -run.cost):
        roomy = [rank for rank in range(world) if used[rank] + run.length <= cap]
        if not roomy:
            rest.insert(0, run)
            continue
        rank = min(roomy, key=lambda rank: (loads[rank], used[rank]))
        placed[rank].append(run)
        used[rank] += run.length
        loads[rank] += run.cost
    return placed, rest, loads


def _pour(placed: list[list[Run]], stream: list[Run], shard_numel: int) -> Shards:
    """Lay each rank's whole runs first, then fill the shards from the stream, cutting it where one is full."""
    pieces: list[list[Piece]] = []
    queue = list(reversed(stream))
    for runs in placed:
        shard: list[Piece] = []
        offset = 0
        for run in runs:
            shard.append(Piece(run.param, run.start, run.length, offset))
            offset += run.length
        while queue and offset < shard_numel:
            run = queue.pop()
            length = min(run.length, shard_numel - offset)
            shard.append(Piece(run.param, run.start, length, offset))
            offset += length
            if length < run.length:
                queue.append(run._replace(start=run.start + length, length=run.length - length))
        pieces.append(shard)
    return pieces, shard_numel
