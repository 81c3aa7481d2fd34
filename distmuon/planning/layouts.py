"""The placements that a plan is compared with."""

from __future__ import annotations

import heapq
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

# Specs, number of ranks, elements of a bucket, FLOPs that each rank spends elsewhere -> plan.
Layout = Callable[[Sequence[ParamSpec], int, int, Sequence[float]], Plan]


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
        Choice("padded", "padded", "whole matrices in shards padded to the longest"),
        # Which of the two a process group takes is decided for each.
        Choice("mixed", "mixed", "balanced: scatter for one process group, owner for the other"),
    )
}
# A padded bucket has at least so much of the largest matrix for every rank (Megatron's PADDING_FLOOR).
_LEAST_FILL = 0.9


def layout(name: LayoutName, ns: NewtonSchulz) -> Layout:
    """Look up a layout.

    Args:
        name: its name; "adamw" and "mixed" are made of others.
        ns: Newton-Schulz settings, which decide what a matrix costs.

    Returns:
        Function of parameters, ranks, elements of a bucket, and FLOPs that each rank spends elsewhere.
    """
    if name == "padded":
        return lambda specs, world, numel, loads: padded_owners(specs, world, numel, ns)
    policies: dict[LayoutName, Policy] = {"flat": "flat", "team": "team"}
    transports: dict[LayoutName, TransportChoice] = {"scatter": "scatter", "owner": "owner"}
    policy, transport = policies.get(name, "balanced"), transports.get(name, "auto")
    return lambda specs, world, numel, loads: make_plan(specs, world, policy, numel, transport, ns, loads=loads)


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
    """Place whole matrices in equal shards that none of them crosses, each as long as the fullest of its bucket.

    Source: Megatron-LM's layer-wise optimizer, ``_compute_per_buffer_param_layout``: a bucket takes matrices in
    backward order, at least nine tenths of a largest one for every rank; long ones first, each goes to the emptiest
    shard. Elementwise parameters have buckets of their own, cut as ZeRO-1 does.

    Args:
        specs: parameters in forward order.
        world: number of ranks.
        bucket_numel: elements after which a bucket is closed.
        ns: Newton-Schulz settings, which decide what a matrix costs.

    Returns:
        A plan with equal shards; its padding counts what the shards have too much.
    """
    work = Work(ns, all_of_it)
    rest: list[list[Run]] = []
    buckets: list[BucketPlan] = []
    chunk: list[Matrix] = []
    numel = largest = 0
    for index, spec in reversed(list(enumerate(specs))):
        found = split_matrices(index, spec, work.of_shape)
        rest.append([Run(index, 0, spec.numel, 0.0)] if spec.numel and not found else [])
        for matrix in found:
            chunk.append(matrix)
            numel, largest = numel + matrix.numel, max(largest, matrix.numel)
            if numel >= max(bucket_numel, int(_LEAST_FILL * world * largest)):
                buckets.append(_padded_bucket(chunk, world))
                chunk, numel, largest = [], 0, 0
    if chunk:
        buckets.append(_padded_bucket(chunk, world))
    for runs in batches(rest, bucket_numel):
        shards = pour([[] for _ in range(world)], runs, equal(runs, world))
        buckets.append(BucketPlan(tuple(shards.lengths), tuple(tuple(shard) for shard in shards.pieces), ()))
    return Plan("balanced", "scatter", world, bucket_numel, tuple(specs), tuple(buckets))


def _padded_bucket(matrices: Sequence[Matrix], world: int) -> BucketPlan:
    pieces: list[list[Piece]] = [[] for _ in range(world)]
    ranks = [(0, rank) for rank in range(world)]
    held = []
    for matrix in sorted(matrices, key=lambda matrix: -matrix.numel):
        used, rank = ranks[0]
        heapq.heapreplace(ranks, (used + matrix.numel, rank))
        pieces[rank].append(Piece(matrix.param, matrix.start, matrix.numel, used))
        held.append(replace(matrix, holders=(rank,), work=(matrix.cost,)))
    longest = max(used for used, _ in ranks)
    held.sort(key=lambda matrix: (matrix.param, matrix.start))
    return BucketPlan((longest,) * world, tuple(tuple(shard) for shard in pieces), tuple(held))
