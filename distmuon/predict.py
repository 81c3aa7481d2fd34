"""How long one optimizer step takes on a described machine, what it sends, and what its buffers take.

Attention's products of queries and keys, and the activations of expert parallelism, are the same for every optimizer
and are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distmuon.link import Collective, Link, collective_seconds
from distmuon.machine import Machine, Workload
from distmuon.simulate import (
    Job,
    Placed,
    Step,
    forward_seconds,
    gather_seconds,
    make_jobs,
    most_in_flight,
    reduce_seconds,
    take_turns,
)
from distmuon.waves import make_waves

__all__ = [
    "Collective",
    "Link",
    "Machine",
    "Placed",
    "Prediction",
    "Workload",
    "collective_seconds",
    "predict",
]

# The guard's all-reduce: whether gradients are finite, and their sum of squares.
_GUARD_BYTES = 16


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step, of the busiest rank where they differ; the step is the sum of all that is not hidden."""

    forward: float
    backward: float
    reduce: float
    """All reductions together, hidden or not."""
    exposed_reduce: float
    """Reductions after the end of backward."""
    guard: float
    """The all-reduce that decides whether gradients are finite and how much they are clipped."""
    complete: float
    """Pieces of cut matrices, and sums of teams' Gram matrices."""
    newton_schulz: float
    update: float
    gather: float
    """All gathers together, hidden or not."""
    exposed_gather: float
    """Gathers that nothing is left to hide."""
    peak_buffer_bytes: int
    """Largest sum of buffers in flight and of reduced gradients, without Newton-Schulz's temporaries."""
    inter_node_bytes: int
    """What a rank sends to other nodes, on average."""
    intra_node_bytes: int
    """What a rank sends within its node, on average."""

    @property
    def optimizer(self) -> float:
        """Seconds that the optimizer adds to forward and backward."""
        exposed = self.exposed_reduce + self.guard + self.complete + self.exposed_gather
        return exposed + self.newton_schulz + self.update

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.forward + self.backward + self.optimizer


def predict(plans: Sequence[Placed], machine: Machine, workload: Workload) -> Prediction:
    """Predict one step.

    Args:
        plans: the plan of every group, with parameters of different names.
        machine: the cluster.
        workload: tokens and precisions.

    Returns:
        The prediction.
    """
    backward, jobs = make_jobs(plans, machine, workload)
    ready = [job.ready for job in jobs]
    reduces = [reduce_seconds(job, machine, workload) for job in jobs]
    reduced = take_turns(ready, reduces)
    sent = [job.bucket.numel for job in jobs]
    world = max((job.plan.world * job.stride for job in jobs), default=1)
    gathers = [gather_seconds(job, workload) for job in jobs]
    step = Step(world, machine, workload)
    found = list(make_waves([job.bucket for job in jobs], workload.wave_numel))
    # As the optimizer does: a forward that waits needs its first parameters first.
    order = [wave[::-1] for wave in found][::-1] if workload.overlap_forward else found
    for wave in order:
        step.advance([jobs[index] for index in wave], [gathers[index] for index in wave])
    jobs = [jobs[index] for wave in order for index in wave]
    sizes = [job.bucket.numel for job in jobs]
    busy = step.newton_schulz + step.update + step.team
    busiest = int(np.argmax(busy))
    buffers = max(
        most_in_flight(ready, reduced, sent) * workload.reduce_itemsize,
        most_in_flight(step.updated, step.gathered, sizes) * workload.param_itemsize,
    )
    inter, intra = _traffic(plans, machine, workload)
    return Prediction(
        forward=backward / 2,
        backward=backward,
        reduce=sum(reduces),
        exposed_reduce=max(0.0, reduced[-1] - backward) if reduced else 0.0,
        guard=collective_seconds("all_reduce", _GUARD_BYTES, world, machine.link()),
        complete=step.pieces + float(step.team[busiest]),
        newton_schulz=float(step.newton_schulz[busiest]),
        update=float(step.update[busiest]),
        gather=sum(gathers),
        exposed_gather=max(0.0, _complete(plans, jobs, step, machine, workload) - float(busy[busiest])),
        peak_buffer_bytes=int(buffers + step.shard.max() * 4),
        inter_node_bytes=round(inter),
        intra_node_bytes=round(intra),
    )


def _complete(plans: Sequence[Placed], jobs: Sequence[Job], step: Step, machine: Machine, workload: Workload) -> float:
    """When all parameters are there, or when a forward that waits for them ends, without its own seconds."""
    if not jobs or not workload.overlap_forward:
        return max(step.gathered, default=0.0)
    available: dict[str, float] = {}
    for job, end in zip(jobs, step.gathered, strict=True):
        for index in job.bucket.params:
            available[job.plan.params[index].name] = end
    now, spent = step.updated[-1], 0.0
    for name, duration in forward_seconds(plans, machine, workload).items():
        now = max(now, available.get(name, 0.0)) + duration
        spent += duration
    return now - spent


def _traffic(plans: Sequence[Placed], machine: Machine, workload: Workload) -> tuple[float, float]:
    """Bytes that a rank sends to other nodes and within its own, on average."""
    inter = total = 0.0
    for plan, stride in plans:
        link = machine.link(stride)
        ring = plan.shard_bytes(workload.reduce_itemsize) + plan.shard_bytes(workload.param_itemsize)
        pieces = 0.0
        for matrix in plan.matrices:
            others = len(matrix.holders) - 1
            pieces += others * matrix.numel if matrix.cut else 0
            pieces += 2 * others * matrix.rounds * matrix.short**2 if matrix.team else 0
        pieces *= workload.piece_itemsize / plan.world
        total += ring + pieces
        inter += ring * link.inter_share(plan.world, "all_gather")
        inter += pieces * link.inter_share(plan.world, "all_to_all")
    return inter, total - inter
