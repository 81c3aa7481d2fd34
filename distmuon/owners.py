"""Shards of unequal length: every matrix whole on one rank, or in slices on a team, in buckets of any size.

Without equal lengths no bucket has to wait for others to be levelled with, so matrices are dealt out once for the whole
model and a bucket is closed as soon as it is full. Elementwise parameters level what each rank holds in all.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence

from distmuon.bricks import Matrix, even_parts, starts
from distmuon.placement import Piece, Run, Shards, batches

# Elements per rank from which an elementwise run is divided among all ranks; a shorter one goes to one of them.
_LEAST_SHARE = 1024
# Teams are formed until the busiest rank is this close to the mean.
LEVEL = 1.05
# Ranks at least this busy, relative to the busiest, are relieved together; both are tried.
_LATE = (0.999, 0.95)
# How much larger a team is tried.
_MORE = (1.5, 2, 3, 4, 8)

# (matrix, number of ranks) -> FLOPs of the largest slice.
SliceCost = Callable[[Matrix, int], float]


def place_owners(params: Sequence[list[Run]], loads: Sequence[float], bucket_numel: int) -> list[Shards]:
    """Deal matrices to the least loaded rank, costly ones first, and close buckets by size alone.

    Args:
        params: runs of each parameter, in the order in which gradients arrive.
        loads: FLOPs that each rank has to spend on other matrices.
        bucket_numel: elements after which a bucket is closed.

    Returns:
        The buckets, with shards of any length, also none.
    """
    world = len(loads)
    owner, lengths, _ = _assign([run for runs in params for run in runs if run.cost], loads)
    total = sum(run.length for runs in params for run in runs)
    missing = [max(0, share - length) for share, length in zip(even_parts(total, world), lengths, strict=True)]
    buckets = []
    for runs in batches(params, bucket_numel):
        shards: list[list[Run]] = [[] for _ in range(world)]
        for run in runs:
            if run.cost:
                shards[owner[run]].append(run)
                continue
            for rank, part in _spread(run, missing):
                shards[rank].append(part)
        buckets.append(_lay(shards))
    return buckets


def team_runs(matrices: Sequence[Matrix], loads: Sequence[float], cost: SliceCost) -> dict[Matrix, list[Run]]:
    """Cut the matrices that keep a rank busy for longer than the others.

    Args:
        matrices: all matrices of the plan, with their cost.
        loads: FLOPs that each rank has to spend on other matrices.
        cost: FLOPs of a slice.

    Returns:
        For each matrix one run, or one a slice.
    """
    teams = {matrix: [whole(matrix)] for matrix in matrices}
    begun, world = loads, len(loads)
    mean = (sum(matrix.cost for matrix in matrices) + sum(begun)) / world
    owner, _, loads = _assign([run for runs in teams.values() for run in runs], begun)
    # Slices repeat work on X X^T, so more of them do not always help: stop when no choice of sizes does.
    while max(loads) > LEVEL * mean:
        best = None
        for late, costly, more in itertools.product(_LATE, (False, True), _MORE):
            excess = {rank: load - mean for rank, load in enumerate(loads) if load >= late * max(loads)}
            tried = teams | {
                matrix: _slices(matrix, min(math.ceil(len(teams[matrix]) * more), world, matrix.long), cost)
                for matrix in _to_cut(teams, owner, excess, costly)
            }
            dealt = _assign([run for runs in tried.values() for run in runs], begun)
            if best is None or _lateness(dealt[2]) < _lateness(best[1][2]):
                best = tried, dealt
        if best is None or _lateness(best[1][2]) >= _lateness(loads):
            break
        teams, (owner, _, loads) = best
    return teams


def _lateness(loads: list[float]) -> tuple[float, int]:
    """What is to be made small: the load of the busiest rank, then how many ranks are as busy."""
    most = max(loads)
    return most, sum(load >= _LATE[0] * most for load in loads)


def _to_cut(
    teams: dict[Matrix, list[Run]], owner: dict[Run, int], excess: dict[int, float], costly: bool
) -> list[Matrix]:
    """For each rank that is late a matrix whose cut relieves it: the cheapest that is enough, or the most costly."""
    candidates: dict[int, list[tuple[bool, float, int, Matrix]]] = {rank: [] for rank in excess}
    for number, (matrix, runs) in enumerate(teams.items()):
        for run in runs:
            rank = owner[run]
            if rank in excess:
                enough = run.cost >= excess[rank] and not costly
                candidates[rank].append((not enough, run.cost if enough else -run.cost, number, matrix))
    return [min(found)[3] for found in candidates.values() if found]


def whole(matrix: Matrix) -> Run:
    """A matrix that stays in one piece.

    Args:
        matrix: with its cost.

    Returns:
        Its run.
    """
    return Run(matrix.param, matrix.start, matrix.numel, matrix.cost, brick=matrix.start)


def _assign(runs: Sequence[Run], loads: Sequence[float]) -> tuple[dict[Run, int], list[int], list[float]]:
    """Longest processing time first: rank of every run, elements and FLOPs by rank; slices of a matrix go apart."""
    owner: dict[Run, int] = {}
    ranks = [(load, 0, rank) for rank, load in enumerate(loads)]
    heapq.heapify(ranks)
    taken: dict[tuple[int, int], set[int]] = {}
    for run in sorted(runs, key=lambda run: (-run.cost, -run.length)):
        others = taken.setdefault((run.param, run.brick), set())
        aside = []
        while ranks[0][2] in others:
            aside.append(heapq.heappop(ranks))
        load, used, rank = ranks[0]
        heapq.heapreplace(ranks, (load + run.cost, used + run.length, rank))
        owner[run] = rank
        others.add(rank)
        for entry in aside:
            heapq.heappush(ranks, entry)
    by_rank = sorted(ranks, key=lambda entry: entry[2])
    return owner, [used for _, used, _ in by_rank], [load for load, _, _ in by_rank]


def _spread(run: Run, missing: list[int]) -> list[tuple[int, Run]]:
    """Divide an elementwise run by what each rank still lacks, which is updated."""
    world = len(missing)
    if run.length < _LEAST_SHARE * world:
        rank = max(range(world), key=lambda rank: missing[rank])
        missing[rank] -= run.length
        return [(rank, run)]
    wanted = [max(0, lack) for lack in missing]
    lacking = sum(wanted)
    shares = [min(want, run.length * want // lacking) for want in wanted] if lacking else [0] * world
    for rank, more in enumerate(even_parts(run.length - sum(shares), world)):
        shares[rank] += more
    parts = []
    for rank, (start, length) in enumerate(zip(starts(shares), shares, strict=True)):
        missing[rank] -= length
        if length:
            parts.append((rank, run._replace(start=run.start + start, length=length)))
    return parts


def _lay(shards: list[list[Run]]) -> Shards:
    pieces: list[list[Piece]] = []
    lengths = []
    for runs in shards:
        offset = 0
        shard = []
        for run in runs:
            shard.append(Piece(run.param, run.start, run.length, offset, run.width, run.stride))
            offset += run.length
        pieces.append(shard)
        lengths.append(offset)
    return Shards(pieces, lengths)


def _slices(matrix: Matrix, size: int, cost: SliceCost) -> list[Run]:
    """Cut the long side into nearly equal parts: blocks of rows, or of columns, which are not consecutive."""
    if size == 1:
        return [whole(matrix)]
    tall = matrix.rows >= matrix.cols
    lengths = even_parts(matrix.long, size)
    flops = cost(matrix, size)
    runs = []
    for first, length in zip(starts(lengths), lengths, strict=True):
        start = matrix.start + first * (matrix.cols if tall else 1)
        width, stride = (0, 0) if tall else (length, matrix.cols)
        runs.append(Run(matrix.param, start, matrix.short * length, flops, width, stride, matrix.start))
    return runs
