"""The number of ranks does not show: what teams make of the same mean gradient.

Policies that keep matrices whole are compared bit by bit in tests/distributed/test_bits.py and test_policies.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from tests.distributed.scenario import Case, Run, flat, train
from tests.oracle import relative
from tests.ranks import run_threads

# Partial sums of X X^T are rounded to the precision of Newton-Schulz before they are added up.
CASES = {
    "float32": (Case(exact=True, clip=1.0), 1e-5),
    "bfloat16": (Case(exact=True, ns="bfloat16"), 0.03),
    "bfloat16 parameters": (Case(exact=True, ns="bfloat16", dtype="bfloat16"), 0.03),
}


@cache
def alone(case: Case) -> Run:
    return run_threads(1, train, case)[0]  # type: ignore[no-any-return]


@pytest.mark.fault("F10")
@pytest.mark.parametrize("name", CASES)
def test_teams_at_every_world(name: str, figure: Callable[[str], None]) -> None:
    """Ranks that share a matrix are equal to the bit, and near one rank up to the rounding of their partial sums."""
    case, tolerance = CASES[name]
    start = flat(alone(replace(case, steps=0)).params)
    total = flat(alone(case).params) - start
    distances, different = {}, 0
    for world in (1, 2, 3, 4, 8):
        runs = run_threads(world, train, replace(case, policy="team"))
        different += sum(run.digests != runs[0].digests for run in runs)
        distances[world] = relative(flat(runs[0].params) - start, total)
        assert distances[world] < tolerance, world
    figure(
        f"teams, {name}: {different} of 18 ranks differ from rank 0; update at 2 to 8 ranks within "
        f"{max(distances.values()):.2g} of that at 1"
    )
    assert different == 0
    assert distances[1] == 0
