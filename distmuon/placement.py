"""Equal shards: how runs of elements are dealt out to the ranks of a reduce-scatter."""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import NamedTuple

# A bucket that could not be levelled is tried again when it has grown by this factor; more often takes too long.
_GROWTH = 1.25


class Run(NamedTuple):
    """Elements of one parameter that stay together; a cost above zero marks a matrix, or a team's slice of one."""

    param: int
    start: int
    length: int
    cost: float
    width: int = 0
    """Consecutive elements in each row of a slice of columns; 0: all elements are consecutive."""
    stride: int = 0
    """Elements from one row of such a slice to the next."""
    brick: int = 0
    """First element of the matrix, which tells the slices of different matrices apart."""


class Piece(NamedTuple):
    """Elements of one parameter and where they lie, without gaps, in a rank's shard of a bucket."""

    param: int
    start: int
    length: int
    offset: int
    width: int = 0
    stride: int = 0

    @property
    def end(self) -> int:
        """First element after a consecutive piece, counted within the parameter."""
        return self.start + self.length


class Dealt(NamedTuple):
    """Whole matrices by rank, what is left to fill the gaps with, and the cost that each rank has then."""

    whole: list[list[Run]]
    rest: list[Run]
    loads: list[float]

    @property
    def level(self) -> bool:
        """Whether every matrix stayed whole in shards of equal length."""
        return not any(run.cost for run in self.rest)


class Sizes:
    """How many matrices of which length a bucket has so far."""

    def __init__(self) -> None:
        self._total = 0
        self._counts: Counter[int] = Counter()

    def add(self, runs: list[Run]) -> None:
        """Count more runs.

        Args:
            runs: the runs.
        """
        self._total += sum(run.length for run in runs)
        self._counts.update(run.length for run in runs if run.cost)

    def may_level(self, world: int) -> bool:
        """Whether equal shards have places enough for the longest matrices; if not, dealing can be spared.

        Args:
            world: number of ranks.
        """
        cap = -(-self._total // world)
        longer = 0
        for length in sorted(self._counts, reverse=True):
            longer += self._counts[length]
            if longer > world * (cap // length):
                return False
        return True


class Shards(NamedTuple):
    """A bucket: per rank the pieces of its shard, and the length of its shard."""

    pieces: list[list[Piece]]
    lengths: list[int]


def place_flat(params: Iterable[list[Run]], world: int, bucket_numel: int) -> list[Shards]:
    """Cut buckets of consecutive parameters into equal contiguous shards, as ZeRO-1 does.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        world: number of ranks.
        bucket_numel: elements after which a bucket is closed.

    Returns:
        The buckets.
    """
    return [pour([[] for _ in range(world)], runs, equal(runs, world)) for runs in batches(params, bucket_numel)]


def place_balanced(params: Iterable[list[Run]], loads: Sequence[float], bucket_numel: int) -> list[Shards]:
    """Keep matrices whole, spread their cost over the ranks, level the shards with elementwise runs.

    Longest processing time first under a cap of the shard length, with the load carried from bucket to bucket. A bucket
    that cannot be levelled takes further parameters; if none are left, it is merged with the buckets before it. Only if
    not even one bucket of everything can be levelled are matrices cut, those that fit nowhere.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        loads: cost that each rank has already.
        bucket_numel: elements after which a bucket is closed.

    Returns:
        The buckets.
    """
    loads, world = list(loads), len(loads)
    closed: list[tuple[list[Run], list[float]]] = []
    placed: list[Shards] = []
    pending: list[Run] = []
    sizes = Sizes()
    too_few = 0
    for runs in batches(params, bucket_numel):
        pending += runs
        sizes.add(runs)
        if len(pending) < _GROWTH * too_few or not sizes.may_level(world):
            continue
        dealt = _deal(pending, loads)
        if dealt.level:
            closed.append((pending, loads))
            placed.append(pour(dealt.whole, dealt.rest, equal(pending, world)))
            loads, pending, sizes, too_few = dealt.loads, [], Sizes(), 0
        else:
            too_few = len(pending)
    while pending:
        if not closed or sizes.may_level(world):
            dealt = _deal(pending, loads)
            if dealt.level or not closed:
                placed.append(pour(dealt.whole, dealt.rest, equal(pending, world)))
                break
        earlier, loads = closed.pop()
        placed.pop()
        pending = earlier + pending
        sizes.add(earlier)
    return placed


def batches(params: Iterable[list[Run]], bucket_numel: int) -> Iterator[list[Run]]:
    """Gather the runs of consecutive parameters until a bucket is full.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        bucket_numel: elements after which a bucket is closed.

    Yields:
        The runs of each bucket.
    """
    batch: list[Run] = []
    numel = 0
    for runs in params:
        batch.extend(runs)
        numel += sum(run.length for run in runs)
        if batch and numel >= bucket_numel:
            yield batch
            batch, numel = [], 0
    if batch:
        yield batch


def equal(runs: list[Run], world: int) -> list[int]:
    """Least equal shard lengths that hold all runs.

    Args:
        runs: the runs of a bucket.
        world: number of ranks.

    Returns:
        The length of every shard.
    """
    return [-(-sum(run.length for run in runs) // world)] * world


def pour(placed: list[list[Run]], stream: list[Run], lengths: list[int]) -> Shards:
    """Lay each rank's whole runs first, then fill the shards from the stream, cutting it where one is full.

    Args:
        placed: whole runs by rank.
        stream: elementwise runs, or matrices that may be cut.
        lengths: of the shards.

    Returns:
        The bucket.
    """
    pieces: list[list[Piece]] = []
    queue = list(reversed(stream))
    for runs, full in zip(placed, lengths, strict=True):
        shard: list[Piece] = []
        offset = 0
        for run in runs:
            shard.append(Piece(run.param, run.start, run.length, offset, run.width, run.stride))
            offset += run.length
        while queue and offset < full:
            run = queue.pop()
            length = min(run.length, full - offset)
            shard.append(Piece(run.param, run.start, length, offset))
            offset += length
            if length < run.length:
                queue.append(run._replace(start=run.start + length, length=run.length - length))
        pieces.append(shard)
    return Shards(pieces, lengths)


def _deal(runs: list[Run], loads: list[float]) -> Dealt:
    """Deal whole matrices to the ranks by cost; if one fits nowhere, try again by length, which packs tighter."""
    by_cost = _longest_first(runs, loads)
    if by_cost.level:
        return by_cost
    by_length = _best_fit(runs, loads)
    return by_length if by_length.level else by_cost


def _longest_first(runs: list[Run], loads: list[float]) -> Dealt:
    """Costly matrices first, each to the least loaded rank with room in its shard."""
    matrices = sorted((run for run in runs if run.cost), key=lambda run: -run.cost)
    dealt, cap = _nothing(runs, loads)
    left: list[Run] = []
    # (load, elements, rank), least loaded first.
    ranks = [(load, 0, rank) for rank, load in enumerate(loads)]
    heapq.heapify(ranks)
    full: list[tuple[float, int, int]] = []
    too_long = 0
    for run in matrices:
        # Who had no room for a matrix has none for one as long.
        if run.length < too_long:
            for entry in full:
                heapq.heappush(ranks, entry)
            full, too_long = [], 0
        while ranks and ranks[0][1] + run.length > cap:
            full.append(heapq.heappop(ranks))
            too_long = run.length
        if ranks:
            load, used, rank = ranks[0]
            heapq.heapreplace(ranks, (load + run.cost, used + run.length, rank))
            dealt.whole[rank].append(run)
            dealt.loads[rank] = load + run.cost
        else:
            left.append(run)
    return dealt._replace(rest=left[::-1] + dealt.rest)


def _best_fit(runs: list[Run], loads: list[float]) -> Dealt:
    """Long matrices first, each to the rank whose shard it fills best, of those to the least loaded."""
    matrices = sorted((run for run in runs if run.cost), key=lambda run: -run.length)
    dealt, cap = _nothing(runs, loads)
    # (elements, -load, -rank), ascending.
    ranks = sorted((0, -load, -rank) for rank, load in enumerate(loads))
    left: list[Run] = []
    for run in matrices:
        place = bisect_right(ranks, (cap - run.length, inf, inf)) - 1
        if place < 0:
            left.append(run)
            continue
        used, load, rank = ranks.pop(place)
        insort(ranks, (used + run.length, load - run.cost, rank))
        dealt.whole[-rank].append(run)
        dealt.loads[-rank] = run.cost - load
    return dealt._replace(rest=left[::-1] + dealt.rest)


def _nothing(runs: list[Run], loads: list[float]) -> tuple[Dealt, int]:
    """A deal without matrices yet, and the length of a shard."""
    whole: list[list[Run]] = [[] for _ in loads]
    return Dealt(whole, [run for run in runs if not run.cost], list(loads)), equal(runs, len(loads))[0]
