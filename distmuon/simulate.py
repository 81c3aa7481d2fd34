"""A step as a simulation: buckets that become ready, one link that takes one of them at a time, ranks that compute.

Backward produces gradients from the last parameter to the first. A bucket is reduced when its last gradient is there,
one bucket after the other. Then come momentum, Newton-Schulz and update bucket by bucket, and behind them the
all-gathers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distmuon.bricks import Matrix
from distmuon.link import Link, collective_seconds
from distmuon.machine import Machine, Workload
from distmuon.plan import BucketPlan, Plan

# An elementwise update reads a float32 gradient, and reads and writes float32 weights and two moments.
_UPDATE_BYTES = 4 + 3 * 8
# What the members of a team agree on before its first round: the largest element, in float32.
_SCALE_BYTES = 4


class Placed(NamedTuple):
    """A plan and the distance of its ranks: 1 for all ranks, the expert-parallel size for expert parameters."""

    plan: Plan
    stride: int = 1


class Job(NamedTuple):
    """A bucket with what its collectives need."""

    ready: float
    bucket: BucketPlan
    plan: Plan
    stride: int
    link: Link


class Step:
    """The ranks' way through the buckets, from the end of the guard."""

    def __init__(self, world: int, machine: Machine, workload: Workload) -> None:
        self.newton_schulz, self.update, self.team, self.shard, self._now = np.zeros((5, world))
        self.pieces = 0.0
        self.updated: list[float] = []
        self.gathered: list[float] = []
        # End and bytes of the all-gathers that no rank has waited for.
        self._flying: list[tuple[float, int]] = []
        self._machine = machine
        self._workload = workload

    def advance(self, wave: Sequence[Job], gather_seconds: Sequence[float]) -> None:
        """Orthogonalize the matrices of a wave of buckets, then update and gather one after the other.

        Args:
            wave: the buckets.
            gather_seconds: what each all-gather takes.
        """
        for job in wave:
            self._complete(job)
            self._orthogonalize_teams(job)
        for job in wave:
            for matrix in job.bucket.matrices:
                if not matrix.team:
                    self._spend(matrix, job.stride)
        for job, seconds in zip(wave, gather_seconds, strict=True):
            lengths: NDArray[np.float64] = np.repeat(np.asarray(job.bucket.lengths, dtype=float), job.stride)
            elementwise = lengths * ((_UPDATE_BYTES + self._workload.param_itemsize) / self._machine.memory_bytes)
            self.shard += lengths
            self.update += elementwise
            self._now += elementwise
            self.updated.append(float(self._now.max()))
            free = self.gathered[-1] if self.gathered else 0.0
            self.gathered.append(max(self.updated[-1], free) + seconds)
            self._flying += [(self.gathered[-1], job.bucket.numel * self._workload.param_itemsize)]
            limit = inf if self._workload.overlap_forward else self._workload.in_flight_bytes
            while len(self._flying) > 1 and sum(size for _, size in self._flying) > limit:
                np.maximum(self._now, self._flying.pop(0)[0], out=self._now)

    def _spend(self, matrix: Matrix, stride: int) -> None:
        for first, last, work in runs_of_holders(matrix):
            ranks = slice(first * stride, (last + 1) * stride)
            seconds = work / self._machine.newton_schulz_flops
            self.newton_schulz[ranks] += seconds
            self._now[ranks] += seconds

    def _complete(self, job: Job) -> None:
        """Exchange the pieces of cut matrices."""
        received: dict[int, float] = {}
        for matrix in job.bucket.matrices:
            if matrix.cut:
                missing = matrix.numel * (1 - 1 / len(matrix.holders)) * self._workload.piece_itemsize
                # Holders in between have this matrix only; its ends may have parts of others too.
                for edge in (matrix.holders[0], matrix.holders[-1]):
                    received[edge] = received.get(edge, 0.0) + missing
        if received:
            self.pieces += _exchange_seconds(max(received.values()), job.plan.world, job.link)

    def _orthogonalize_teams(self, job: Job) -> None:
        """Let the teams of a bucket go through their rounds together; every rank takes part."""
        teams = [matrix for matrix in job.bucket.matrices if matrix.team]
        if not teams:
            return
        sent: dict[int, float] = {}
        for matrix in teams:
            self._spend(matrix, job.stride)
            part = matrix.short**2 * (1 - 1 / len(matrix.holders)) * self._workload.piece_itemsize
            for holder in matrix.holders:
                sent[holder] = sent.get(holder, 0.0) + part
        # A round is a reduce-scatter and an all-gather of X X^T, both as exchanges between the members of a team.
        largest, rounds = (max(len(matrix.holders) for matrix in teams), max(matrix.rounds for matrix in teams))
        seconds = 2 * rounds * _exchange_seconds(max(sent.values()), largest, job.link)
        seconds += collective_seconds("all_reduce", _SCALE_BYTES * len(teams), job.plan.world, job.link)
        self.team += seconds
        self._now[:] = self._now.max() + seconds


def runs_of_holders(matrix: Matrix) -> Iterator[tuple[int, int, float]]:
    """Group the ranks that hold a matrix: neighbours that all compute the whole of it at once, others one by one.

    Args:
        matrix: a matrix of a plan.

    Yields:
        First rank, last rank, FLOPs of each of them.
    """
    first, last = matrix.holders[0], matrix.holders[-1]
    if not matrix.team and last - first + 1 == len(matrix.holders):
        yield first, last, matrix.work[0]
        return
    for rank, work in zip(matrix.holders, matrix.work, strict=True):
        yield rank, rank, work


def make_jobs(plans: Sequence[Placed], machine: Machine, workload: Workload) -> tuple[float, list[Job]]:
    """List the buckets in the order in which their gradients are complete.

    Args:
        plans: the plan of every group.
        machine: the cluster.
        workload: tokens and precisions.

    Returns:
        Seconds of backward, and the buckets.
    """
    forward = forward_seconds(plans, machine, workload)
    total = sum(forward.values())
    # A backward takes twice its forward, and goes through the parameters from the last to the first.
    begun = accumulate(forward.values(), initial=0.0)
    arrival = {name: 2 * (total - start) for name, start in zip(forward, begun, strict=False)}
    jobs = [
        Job(arrival[plan.params[bucket.params[0]].name], bucket, plan, stride, machine.link(stride))
        for plan, stride in plans
        for bucket in plan.buckets
    ]
    return 2 * total, sorted(jobs, key=lambda job: job.ready)


def forward_seconds(plans: Sequence[Placed], machine: Machine, workload: Workload) -> dict[str, float]:
    """Seconds that a forward spends on each parameter.

    Args:
        plans: the plan of every group.
        machine: the cluster.
        workload: tokens, and FLOPs by parameter.

    Returns:
        Seconds by name, in forward order.
    """
    flops = workload.flops or {
        spec.name: 2.0 * spec.numel if spec.kind == "muon" else 0.0 for plan, _ in plans for spec in plan.params
    }
    return {name: value * workload.tokens_per_rank / machine.model_flops for name, value in flops.items()}


def take_turns(ready: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """When each of the jobs ends that take turns on one link.

    Args:
        ready: when each could begin, in the order of their turns.
        seconds: what each takes.

    Returns:
        The ends, ascending.
    """
    ends: list[float] = []
    free = 0.0
    for begin, duration in zip(ready, seconds, strict=True):
        free = max(free, begin) + duration
        ends.append(free)
    return ends


def reduce_seconds(job: Job, machine: Machine, workload: Workload) -> float:
    """What reducing a bucket takes; on a backend without rings, owners receive their piece from every other rank.

    Args:
        job: the bucket.
        machine: the cluster.
        workload: tokens and precisions.

    Returns:
        Seconds.
    """
    world, size, item = job.plan.world, job.bucket.numel, workload.reduce_itemsize
    direct = machine.reduce_scatter == "all_to_all"
    if job.plan.transport == "scatter":
        return collective_seconds("all_to_all" if direct else "reduce_scatter", size * item, world, job.link)
    least, most = min(job.bucket.lengths), max(job.bucket.lengths)
    if direct and world > 1:
        return _exchange_seconds(max(size - least, (world - 1) * most) * item, world, job.link)
    return collective_seconds("owner_reduce", size * item, world, job.link, least * item)


def gather_seconds(job: Job, workload: Workload) -> float:
    """What gathering a bucket takes.

    Args:
        job: the bucket.
        workload: tokens and precisions.

    Returns:
        Seconds.
    """
    size, item = job.bucket.numel, workload.param_itemsize
    if job.plan.transport == "scatter":
        return collective_seconds("all_gather", size * item, job.plan.world, job.link)
    return collective_seconds("owner_broadcast", size * item, job.plan.world, job.link, min(job.bucket.lengths) * item)


def _exchange_seconds(busiest: float, world: int, link: Link) -> float:
    """An all-to-all in which the busiest rank sends, or receives, so many bytes."""
    return collective_seconds("all_to_all", busiest * world / (world - 1), world, link)


def most_in_flight(begins: Sequence[float], ends: Sequence[float], sizes: Sequence[int]) -> int:
    """Largest sum of sizes at one time.

    Args:
        begins: when each comes to be, ascending.
        ends: when each is gone, ascending.
        sizes: how large each is.

    Returns:
        The sum.
    """
    most = flying = done = 0
    for number, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        while done < number and ends[done] <= begin:
            flying -= sizes[done]
            done += 1
        flying += size
        most = max(most, flying)
    return most
