"""The placements that a plan is compared with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from distmuon.bricks import Matrix, ParamSpec, split_matrices
from distmuon.ns_settings import NewtonSchulz
from distmuon.placement import Piece, Run, batches, equal, pour
from distmuon.plan import BucketPlan, Plan, Policy
from distmuon.planner import TransportChoice, Work, all_of_it, make_plan
from distmuon.planning.holdings import Holdings
from distmuon.predict import Placed

LayoutName = Literal["adamw", "flat", "scatter", "owner", "team", "padded", "mixed"]

# Specs, number of ranks, elements of a bucket -> plan.
Layout = Callable[[Sequence[ParamSpec], int, int], Plan]


@dataclass(frozen=True)
class Choice:
    """A layout with what tables say of it."""

    name: LayoutName
    title: str
    what: str


CHOICES: dict[LayoutName, Choice] = {
    choice.name: choice
    for choice in (
        Choice("adamw", "AdamW", "AdamW with ZeRO-1: equal shards, two moments, no Newton-Schulz"),
        Choice("flat", "flat", "the papers: equal shards; every rank with a piece of a matrix computes all of it"),
        Choice(
            "scatter",
            "scatter",
            "balanced over equal shards: reduce-scatter, all-gather; buckets grow until level",
        ),
        Choice("owner", "owner", "balanced over shards of any length: reduced to and broadcast from their owners"),
        Choice("team", "team", "as owner; matrices too large for one rank are cut over several that compute together"),
        Choice("padded", "padded", "whole matrices, one size at a time, padded: as Megatron's layer-wise optimizer"),
        # Which of the two a process group takes is decided for each.
        Choice("mixed", "mixed", "balanced: scatter for one process group, owner for the other"),
    )
}
# How much busier than the mean a rank may be before policy = "team" cuts matrices (distmuon.owners).
TEAM_TOLERANCE = 1.05


def layout(name: LayoutName, ns: NewtonSchulz) -> Layout:
    """Look up a layout.

    Args:
        name: its name; "adamw" and "mixed" are made of others.
        ns: Newton-Schulz settings, which decide what a matrix costs.

    Returns:
        Function of parameters, ranks and elements of a bucket.
    """
    if name == "padded":
        return lambda specs, world, numel: padded_owners(specs, world, numel, ns)
    policies: dict[LayoutName, Policy] = {"flat": "flat", "team": "team"}
    transports: dict[LayoutName, TransportChoice] = {"scatter": "scatter", "owner": "owner"}
    policy, transport = policies.get(name, "balanced"), transports.get(name, "auto")
    return lambda specs, world, numel: make_plan(specs, world, policy, numel, transport, ns)


def adamw(plans: Sequence[Placed], held: Holdings) -> tuple[list[Placed], Holdings]:
    """Turn plans of policy "flat" into AdamW's with ZeRO-1, which cuts the same shards.

    Args:
        plans: the plan of every group.
        held: what the ranks hold in them.

    Returns:
        Plans without matrices, and what the ranks hold in those.
    """
    without = [
        Placed(
            replace(
                plan,
                params=tuple(replace(spec, kind="adamw") for spec in plan.params),
                buckets=tuple(replace(bucket, matrices=()) for bucket in plan.buckets),
            ),
            stride,
        )
        for plan, stride in plans
    ]
    none = np.zeros_like(held.flops)
    second = np.sum(list(held.by_part.values()), axis=0)
    return without, replace(held, second_moments=second, bricks=none, flops=none)


def padded_owners(specs: Sequence[ParamSpec], world: int, bucket_numel: int, ns: NewtonSchulz) -> Plan:
    """Place whole matrices in equal shards by their size alone, and pad where there are not enough of a size.

    Source: Megatron-LM's layer-wise optimizer, ``_compute_per_buffer_param_layout``: the next matrix in backward order
    goes to the first rank, the next of the same size to each other rank, or padding where none is left. Elementwise
    parameters have buckets of their own, cut as ZeRO-1 does.

    Args:
        specs: parameters in forward order.
        world: number of ranks.
        bucket_numel: elements after which a bucket is closed.
        ns: Newton-Schulz settings, which decide what a matrix costs.

    Returns:
        A plan with equal shards; its padding counts what the shards have too much.
    """
    work = Work(ns, all_of_it)
    by_size: dict[int, deque[Matrix]] = {}
    rest: list[list[Run]] = []
    for index, spec in reversed(list(enumerate(specs))):
        found = split_matrices(index, spec, work.of_shape)
        for matrix in found:
            by_size.setdefault(matrix.numel, deque()).append(matrix)
        rest.append([Run(index, 0, spec.numel, 0.0)] if spec.numel and not found else [])
    buckets = []
    rounds: list[list[Matrix]] = []
    while by_size:
        size = max(by_size, key=lambda size: by_size[size][0].param)
        queue = by_size[size]
        rounds.append([queue.popleft() for _ in range(min(world, len(queue)))])
        if not queue:
            del by_size[size]
        if not by_size or sum(matrices[0].numel for matrices in rounds) * world >= bucket_numel:
            buckets.append(_padded_bucket(rounds, world))
            rounds = []
    for runs in batches(rest, bucket_numel):
        shards = pour([[] for _ in range(world)], runs, equal(runs, world))
        buckets.append(BucketPlan(tuple(shards.lengths), tuple(tuple(shard) for shard in shards.pieces), ()))
    return Plan("balanced", "scatter", world, bucket_numel, tuple(specs), tuple(buckets))


def _padded_bucket(rounds: Sequence[Sequence[Matrix]], world: int) -> BucketPlan:
    """Lay rounds of equally large matrices, one a rank, behind each other."""
    pieces: list[list[Piece]] = [[] for _ in range(world)]
    held = []
    offset = 0
    for matrices in rounds:
        for rank, matrix in enumerate(matrices):
            pieces[rank].append(Piece(matrix.param, matrix.start, matrix.numel, offset))
            held.append(replace(matrix, holders=(rank,), work=(matrix.cost,)))
        offset += matrices[0].numel
    held.sort(key=lambda matrix: (matrix.param, matrix.start))
    return BucketPlan((offset,) * world, tuple(tuple(shard) for shard in pieces), tuple(held))
