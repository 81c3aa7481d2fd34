"""The placement policies: how runs of elements are dealt out to the shards of a bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

# A bucket that could not be levelled is tried again when it has grown by this factor; more often takes too long.
_GROWTH = 1.25


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


class Dealt(NamedTuple):
    """Whole matrices by rank, what is left to fill the gaps with, and the cost that each rank has then."""

    whole: list[list[Run]]
    rest: list[Run]
    loads: list[int]

    @property
    def level(self) -> bool:
        """Whether every matrix stayed whole in shards of equal length."""
        return not any(run.cost for run in self.rest)


# Per rank the pieces of its shard, and the length of every shard.
Shards = tuple[list[list[Piece]], int]


def place_flat(params: Iterable[list[Run]], world: int, bucket_numel: int) -> list[Shards]:
    """Cut buckets of consecutive parameters into equal contiguous shards, as ZeRO-1 does.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        world: number of ranks.
        bucket_numel: elements after which a bucket is closed.

    Returns:
        Pieces per rank and shard length, one pair a bucket.
    """
    return [
        _pour([[] for _ in range(world)], runs, _shard_numel(runs, world)) for runs in _batches(params, bucket_numel)
    ]


def place_balanced(params: Iterable[list[Run]], world: int, bucket_numel: int) -> list[Shards]:
    """Keep matrices whole, spread their cost over the ranks, level the shards with elementwise runs.

    Longest processing time first under a cap of the shard length, with the load carried from bucket to bucket. A bucket
    that cannot be levelled takes further parameters; if none are left, it is merged with the buckets before it. Only if
    not even one bucket of everything can be levelled are matrices cut, those that fit nowhere.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        world: number of ranks.
        bucket_numel: elements after which a bucket is closed.

    Returns:
        Pieces per rank and shard length, one pair a bucket.
    """
    closed: list[tuple[list[Run], list[int]]] = []
    placed: list[Shards] = []
    loads = [0] * world
    pending: list[Run] = []
    too_few = 0
    for runs in _batches(params, bucket_numel):
        pending += runs
        if len(pending) < _GROWTH * too_few:
            continue
        dealt = _deal(pending, loads)
        if dealt.level:
            closed.append((pending, loads))
            placed.append(_pour(dealt.whole, dealt.rest, _shard_numel(pending, world)))
            loads, pending, too_few = dealt.loads, [], 0
        else:
            too_few = len(pending)
    while pending:
        dealt = _deal(pending, loads)
        if dealt.level or not closed:
            placed.append(_pour(dealt.whole, dealt.rest, _shard_numel(pending, world)))
            break
        earlier, loads = closed.pop()
        placed.pop()
        pending = earlier + pending
    return placed


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


def _deal(runs: list[Run], loads: list[int]) -> Dealt:
    """Deal whole matrices to the ranks by cost; if one fits nowhere, try again by length, which packs tighter."""
    by_cost = _longest_first(runs, loads)
    if by_cost.level:
        return by_cost
    by_length = _best_fit(runs, loads)
    return by_length if by_length.level else by_cost


def _longest_first(runs: list[Run], loads: list[int]) -> Dealt:
    """Costly matrices first, each to the least loaded rank with room in its shard."""
    matrices = sorted((run for run in runs if run.cost), key=lambda run: -run.cost)
    return _place(matrices, runs, loads, lambda rank, used, load: (load[rank], used[rank]))


def _best_fit(runs: list[Run], loads: list[int]) -> Dealt:
    """Long matrices first, each to the rank whose shard it fills best."""
    matrices = sorted((run for run in runs if run.cost), key=lambda run: -run.length)
    return _place(matrices, runs, loads, lambda rank, used, load: (-used[rank], load[rank]))


def _place(
    matrices: list[Run], runs: list[Run], loads: list[int], preference: Callable[[int, list[int], list[int]], Any]
) -> Dealt:
    """Give each matrix to the rank with room in its shard that is preferred most (least value)."""
    world, cap = len(loads), _shard_numel(runs, len(loads))
    loads, used = list(loads), [0] * world
    whole: list[list[Run]] = [[] for _ in range(world)]
    rest = [run for run in runs if not run.cost]
    for run in matrices:
        roomy = [rank for rank in range(world) if used[rank] + run.length <= cap]
        if not roomy:
            rest.insert(0, run)
            continue
        rank = min(roomy, key=lambda rank: preference(rank, used, loads))
        whole[rank].append(run)
        used[rank] += run.length
        loads[rank] += run.cost
    return Dealt(whole, rest, loads)


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
