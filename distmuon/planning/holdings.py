"""What every rank holds and computes under a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from distmuon.plan import STATE_ITEMSIZE, Plan
from distmuon.planning.parameters import Part, PlannedParam
from distmuon.simulate import Placed, runs_of_holders

Ranks = NDArray[np.float64]


@dataclass(frozen=True)
class Holdings:
    """What every rank holds and computes, [world] each."""

    elements: Ranks
    """Elements of the shards, padding included."""
    by_part: Mapping[Part, Ranks]
    """Elements by what they belong to, without padding."""
    second_moments: Ranks
    bricks: Ranks
    """Matrices that the rank orthogonalizes, or a slice of."""
    flops: Ranks
    """Of Newton-Schulz."""

    def state_bytes(self, param_itemsize: int) -> Ranks:
        """First moments, second moments of elementwise parameters, master weights of 16-bit parameters.

        Args:
            param_itemsize: bytes per element of the parameters.
        """
        copies = 2 if param_itemsize < STATE_ITEMSIZE else 1
        held: Ranks = STATE_ITEMSIZE * (copies * self.elements + self.second_moments)
        return held


def holdings(plans: Sequence[Placed], params: Sequence[PlannedParam]) -> Holdings:
    """Add up what every rank holds.

    Args:
        plans: the plan of every group.
        params: the parameters, for what they belong to.

    Returns:
        The sums.
    """
    parts = {param.spec.name: param.part for param in params if param.exists}
    totals: dict[str, Ranks] = {}
    for plan, stride in plans:
        found = _of_plan(plan, parts)
        for key, values in found.items():
            totals[key] = totals.get(key, 0.0) + np.repeat(values, stride)
    by_part: dict[Part, Ranks] = {part: totals[part] for part in get_args(Part)}
    return Holdings(totals["elements"], by_part, totals["second"], totals["bricks"], totals["flops"])


def _of_plan(plan: Plan, parts: Mapping[str, Part]) -> dict[str, Ranks]:
    keys = ("elements", "second", "bricks", "flops", *get_args(Part))
    found: dict[str, Ranks] = {key: np.zeros(plan.world) for key in keys}
    lists = {key: [0.0] * plan.world for key in keys}
    part_of = [parts[spec.name] for spec in plan.params]
    second = [spec.kind == "adamw" for spec in plan.params]
    for bucket in plan.buckets:
        found["elements"] += np.asarray(bucket.lengths, dtype=float)
        for rank, pieces in enumerate(bucket.pieces):
            for piece in pieces:
                lists[part_of[piece.param]][rank] += piece.length
                if second[piece.param]:
                    lists["second"][rank] += piece.length
        for matrix in bucket.matrices:
            for first, last, work in runs_of_holders(matrix):
                found["bricks"][first : last + 1] += 1
                found["flops"][first : last + 1] += work
    return {key: found[key] + np.asarray(lists[key]) for key in keys}
