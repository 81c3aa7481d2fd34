"""One layout of a model on a number of ranks, in figures: what each rank holds and computes, what a step sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from distmuon.machine import Machine, Workload
from distmuon.plan import Plan
from distmuon.planning.holdings import Holdings, Ranks
from distmuon.planning.layouts import Choice, Layout, LayoutName
from distmuon.planning.parameters import PlannedParam
from distmuon.predict import Placed, predict


@dataclass(frozen=True)
class Spread:
    """Least, mean and largest of something that ranks have different amounts of."""

    least: float
    mean: float
    most: float


@dataclass(frozen=True)
class Row:
    """A layout's line in the comparison; bytes are per rank and step."""

    layout: LayoutName
    what: str
    buckets: int
    largest_bucket_bytes: int
    padding: float
    """Elements added, relative to the model's."""
    bricks: Spread
    newton_schulz_max_over_mean: float
    newton_schulz_sum_over_once: float
    calls: int
    """Collectives per step, the guard included; a coalesced group counts once."""
    reduce_bytes: int
    gather_bytes: int
    complete_bytes: int
    """Pieces of cut matrices and teams' Gram matrices, on average."""
    state_bytes: Spread
    prediction: Mapping[str, float]
    """Seconds and bytes of ``distmuon.predict.Prediction``, with "optimizer" and "step"."""

    @property
    def bytes(self) -> int:
        """All that a rank sends."""
        return self.reduce_bytes + self.gather_bytes + self.complete_bytes


def place(params: Sequence[PlannedParam], layout: Layout, world: int, ep: int, bucket_numel: int) -> list[Placed]:
    """Plan every process group.

    Args:
        params: what a rank has a copy of, in forward order.
        layout: how to place a group's parameters.
        world: number of ranks.
        ep: ranks that share the experts of a block; 1 has experts in the data-parallel group.
        bucket_numel: elements after which a bucket is closed.

    Returns:
        The plan of the data-parallel group, and of the expert-data-parallel group if it is another.
    """
    specs = [param.spec for param in params if param.exists and not (param.expert and ep > 1)]
    experts = [param.spec for param in params if param.exists and param.expert and ep > 1]
    if not experts:
        return [Placed(layout(specs, world, bucket_numel, ()))]
    of_experts = layout(experts, world // ep, bucket_numel, ())
    # As the optimizer does: everything else is levelled with what the experts cost each rank.
    loads = [of_experts.newton_schulz_flops(rank // ep) for rank in range(world)]
    return [Placed(layout(specs, world, bucket_numel, loads)), Placed(of_experts, ep)]


def compare(choice: Choice, plans: Sequence[Placed], held: Holdings, machine: Machine, workload: Workload) -> Row:
    """Put a layout into figures.

    Args:
        choice: the layout.
        plans: its plan of every group.
        held: what ``holdings`` found in them.
        machine: the cluster.
        workload: tokens and precisions.

    Returns:
        The row.
    """
    prediction = predict(plans, machine, workload)
    buckets = [bucket for plan, _ in plans for bucket in plan.buckets]
    total = float(held.flops.sum())
    # Every place of an expert-parallel group has experts of its own.
    once = sum(plan.flops_once * stride for plan, stride in plans)
    return Row(
        layout=choice.name,
        what=choice.what,
        buckets=len(buckets),
        largest_bucket_bytes=max((bucket.numel for bucket in buckets), default=0) * workload.reduce_itemsize,
        padding=sum(plan.padding * stride for plan, stride in plans)
        / max(1, sum(plan.numel * stride for plan, stride in plans)),
        bricks=spread(held.bricks),
        newton_schulz_max_over_mean=float(held.flops.max()) * len(held.flops) / total if total else 1.0,
        newton_schulz_sum_over_once=total / once if total else 0.0,
        calls=_calls(plans),
        reduce_bytes=sum(plan.shard_bytes(workload.reduce_itemsize) for plan, _ in plans),
        gather_bytes=sum(plan.shard_bytes(workload.param_itemsize) for plan, _ in plans),
        complete_bytes=round(sum(_complete_bytes(plan, workload.piece_itemsize) for plan, _ in plans)),
        state_bytes=spread(held.state_bytes(workload.param_itemsize)),
        prediction={**asdict(prediction), "optimizer": prediction.optimizer, "step": prediction.step},
    )


def spread(values: Ranks) -> Spread:
    """Summarize what the ranks have.

    Args:
        values: [world].

    Returns:
        Least, mean and most.
    """
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


def _calls(plans: Sequence[Placed]) -> int:
    calls = 1 if any(plan.world > 1 for plan, _ in plans) else 0
    for plan, _ in plans:
        for bucket in plan.buckets if plan.world > 1 else ():
            calls += 2 + any(matrix.cut for matrix in bucket.matrices)
            # A team agrees on a scale, then sums X X^T by two exchanges a round.
            rounds = max((matrix.rounds for matrix in bucket.matrices if matrix.team), default=0)
            calls += 1 + 2 * rounds if rounds else 0
    return calls


def _complete_bytes(plan: Plan, itemsize: int) -> float:
    """Bytes that a rank sends for cut matrices and teams, on average."""
    pieces = sum((len(matrix.holders) - 1) * matrix.numel for matrix in plan.matrices if matrix.cut)
    teams = any(matrix.team for matrix in plan.matrices)
    sums = sum(plan.team_bytes(rank, itemsize) for rank in range(plan.world)) if teams else 0
    return (pieces * itemsize + sums) / plan.world
