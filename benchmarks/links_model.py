"""Step time at one link speed, predicted from step time without a limit and from what is known to be sent.

The link is the alpha-beta one of ``distmuon plan``. DistMuon's buckets go through the planner's own simulation; the
others' collectives are listed by hand. Nothing measured at a limited speed enters but what a plain socket gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distmuon.plan import Plan
from distmuon.predict import Collective, Link, Machine, Placed, Workload, collective_seconds, predict

# Of a forward and a backward; the latter computes two products for each of the former's.
_BACKWARD = 2 / 3
_HALVINGS = 60
_ITEMSIZE = 4
# Newton-Schulz inputs travel in bfloat16.
_PIECE_ITEMSIZE = 2
# Bytes of the buffers that gloo's collectives are timed on.
PAYLOAD = 2**24
# FLOP/s or bytes/s at which nothing takes time.
_INSTANT = 1e30


class Compute(NamedTuple):
    """Seconds of a step that need no link."""

    model: float
    """Forward and backward, and all that is listed nowhere else."""
    newton_schulz: float = 0.0
    update: float = 0.0


class Call(NamedTuple):
    """A collective and the bytes of its full buffer."""

    kind: Collective
    payload: float


class Listed(NamedTuple):
    """What a contender without a plan sends in a step."""

    early: tuple[Call, ...]
    """Under way from the first gradients on, while backward goes on."""
    late: tuple[Call, ...]
    """One after the other when backward has ended; nothing is computed meanwhile."""


def wire_bytes(sends: Sequence[Plan] | Listed, world: int) -> float:
    """Bytes that a rank sends in a step by the ring model, known before the run.

    Args:
        sends: what a contender sends; plans are of float32 parameters.
        world: number of ranks.

    Returns:
        Bytes, the mean over the ranks.
    """
    if isinstance(sends, Listed):
        return sum(ring_bytes(call.kind, call.payload, world) for call in sends.early + sends.late)
    reduced_and_gathered = sum(2.0 * plan.shard_bytes(_ITEMSIZE) for plan in sends)
    pieces = sum(
        plan.completion_bytes(rank, _PIECE_ITEMSIZE) + plan.team_bytes(rank, _PIECE_ITEMSIZE)
        for plan in sends
        for rank in range(world)
    )
    return reduced_and_gathered + pieces / world


def ring_bytes(kind: Collective, payload: float, world: int) -> float:
    """Bytes that each rank sends for one collective by the ring model.

    Args:
        kind: the collective.
        payload: bytes of its full buffer.
        world: number of ranks.

    Returns:
        Bytes.
    """
    return (2.0 if kind == "all_reduce" else 1.0) * payload * (world - 1) / world


def listed_seconds(compute: Compute, listed: Listed, world: int, link: Link) -> float:
    """Predict the step of a contender without a plan.

    Args:
        compute: what it computes.
        listed: what it sends.
        world: number of ranks.
        link: what joins them.

    Returns:
        Seconds.
    """
    early, late = (
        sum(collective_seconds(call.kind, call.payload, world, link) for call in calls)
        for calls in (listed.early, listed.late)
    )
    return sum(compute) + max(0.0, early - _BACKWARD * compute.model) + late


def planned_seconds(compute: Compute, plans: Sequence[Plan], link: Link) -> float:
    """Predict the step of DistMuon with the planner's simulation.

    Args:
        compute: what it computes on its busiest rank.
        plans: its plans, of float32 parameters that are reduced in float32.
        link: what joins the ranks.

    Returns:
        Seconds.
    """
    placed = [Placed(plan) for plan in plans]
    # Which gradients come when: every parameter works in proportion to its size, whatever updates it.
    flops = {spec.name: 2.0 * spec.numel for plan in plans for spec in plan.params}
    workload = Workload(tokens_per_rank=1, flops=flops)
    once = predict(placed, _machine(1.0, 1.0, 1.0, link), workload)
    # The speeds at which the plan's FLOPs and bytes take the seconds that were measured.
    machine = _machine(
        _speed(once.forward + once.backward, compute.model),
        _speed(once.newton_schulz, compute.newton_schulz),
        _speed(once.update, compute.update),
        link,
    )
    return predict(placed, machine, workload).step


def without_limit(step: Callable[[float], float], wall: float) -> float:
    """Find the seconds of computing that explain a measured step.

    Args:
        step: predicts a step from the seconds that the model computes, and grows with them.
        wall: the measured step, without a limit.

    Returns:
        The seconds; 0 if the collectives alone are predicted to take longer.
    """
    low, high = 0.0, wall
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if step(middle) < wall else (low, middle)
    return low


def predict_all(
    wall: float,
    rest: tuple[float, float],
    sends: Sequence[Plan] | Listed,
    world: int,
    links: Sequence[Link],
) -> list[float]:
    """Predict a contender's step at several link speeds.

    Args:
        wall: its measured step at the first of them, which has no limit.
        rest: seconds of Newton-Schulz and of the update in there, 0 where not known apart from the model.
        sends: what it sends.
        world: number of ranks.
        links: the link at each speed.

    Returns:
        Seconds; the first equals ``wall``.
    """

    def seconds(model: float, link: Link) -> float:
        compute = Compute(model, *rest)
        if isinstance(sends, Listed):
            return listed_seconds(compute, sends, world, link)
        return planned_seconds(compute, sends, link)

    model = without_limit(lambda model: seconds(model, links[0]), wall)
    return [seconds(model, link) for link in links]


def find_links(goodputs: Sequence[float], host: Mapping[str, float], world: int) -> list[Link]:
    """Describe the link as collectives find it.

    Args:
        goodputs: what plain sockets get at each link speed, bits per second.
        host: seconds of gloo's collectives on ``PAYLOAD`` bytes without a limit, and of a "tiny" all-reduce.
        world: number of ranks.

    Returns:
        The links. gloo copies and adds, which bounds it where the link does not.
    """
    kinds: tuple[Collective, ...] = ("all_gather", "all_reduce")
    by_host = sum(ring_bytes(kind, PAYLOAD, world) for kind in kinds) / sum(host[kind] for kind in kinds)
    # A ring passes 2 (d - 1) messages on for an all-reduce.
    latency = host["tiny"] / (2 * (world - 1))
    return [Link(min(goodput / 8, by_host), latency) for goodput in goodputs]


def _speed(amount: float, seconds: float) -> float:
    return amount / seconds if amount > 0 and seconds > 0 else _INSTANT


def _machine(model: float, newton_schulz: float, memory: float, link: Link) -> Machine:
    """Describe ranks that are nodes of their own, on gloo."""
    peak = max(model, newton_schulz)
    settings: dict[str, Any] = {
        "name": "network namespaces",
        "peak_flops": peak,
        "model_efficiency": model / peak,
        "newton_schulz_efficiency": newton_schulz / peak,
        "memory_bandwidth": memory,
        "memory_efficiency": 1.0,
        "ranks_per_node": 1,
        "inter_bandwidth": link.bandwidth,
        "link_efficiency": 1.0,
        "inter_latency": link.latency,
        "call_overhead": link.overhead,
        "reduce_scatter": "all_to_all",
    }
    return Machine(**settings)
