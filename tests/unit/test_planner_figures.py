"""What placement promises in figures, for small blocks and for published models."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from distmuon.bricks import ParamSpec
from distmuon.plan import Plan
from distmuon.planner import make_plan
from tests.unit.plans import flops_by_rank, llama3_8b, one_trillion, plain_blocks, qwen3_30b, spread

REPO = Path(__file__).resolve().parents[2]
WORLDS = [2, 3, 4, 6, 8, 12, 16, 24, 32, 64]


@cache
def published(name: str) -> tuple[ParamSpec, ...]:
    return tuple({"llama3_8b": llama3_8b, "qwen3_30b": qwen3_30b}[name]())


def once(plan: Plan) -> float:
    """Newton-Schulz FLOPs summed over the ranks, relative to every matrix once."""
    return sum(flops_by_rank(plan)) / plan.flops_once


@pytest.mark.parametrize("transport", ["auto", "scatter", "owner"])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_padding_of_small_models(layers: int, world: int, transport: Any) -> None:
    for bucket in (10_000, 6_250_000):
        plan = make_plan(plain_blocks(layers), world, "balanced", bucket, transport)
        assert plan.padding <= 0.02 * plan.numel
        assert plan.padding == 0 or transport == "scatter" or plan.transport == "scatter"
        if transport != "scatter":
            assert once(plan) == 1.0


@pytest.mark.parametrize(
    ("name", "world"),
    [*[("llama3_8b", world) for world in WORLDS], *[("qwen3_30b", world) for world in (3, 8, 48, 64)]],
)
def test_published_models_are_level_and_computed_once(name: str, world: int) -> None:
    plan = make_plan(published(name), world)
    assert plan.numel == {"llama3_8b": 8_030_261_248, "qwen3_30b": 30_532_110_336}[name]
    assert plan.padding <= 0.02 * plan.numel
    assert once(plan) == 1.0
    assert spread(plan) <= 1.05


def test_teams_level_where_whole_matrices_cannot() -> None:
    """Of 96 large and 64 smaller matrices, 48 ranks get 2 and 1 each, and 16 are left over."""
    worst = {"balanced": 1.0, "team": 1.0}
    for world in range(2, 65):
        alone, team = (make_plan(published("llama3_8b"), world, policy) for policy in ("balanced", "team"))
        busiest = max(flops_by_rank(team)) * world / team.flops_once
        assert spread(team) <= 1.07
        assert busiest <= min(1.08, spread(alone))
        worst = {"balanced": max(worst["balanced"], spread(alone)), "team": max(worst["team"], spread(team))}
    assert 1.15 < worst["balanced"] < 1.20
    assert worst["team"] <= 1.07


@pytest.mark.parametrize("world", [256, 1024])
def test_more_ranks_than_large_matrices(world: int) -> None:
    plan = make_plan(published("llama3_8b"), world)
    assert plan.padding <= 0.02 * plan.numel
    assert once(plan) == 1.0
    if world == 256:
        team = make_plan(published("llama3_8b"), world, "team")
        assert team.padding == 0
        assert max(flops_by_rank(team)) <= 0.8 * max(flops_by_rank(plan))


def test_a_trillion_parameters_on_a_thousand_ranks() -> None:
    plan = make_plan(one_trillion(), 1024)
    assert 1.0e12 < plan.numel < 1.1e12
    assert len(plan.matrices) == 60 * (4 + 1 + 3 * 384)
    assert plan.padding <= 0.02 * plan.numel
    assert once(plan) == 1.0
    assert spread(plan) <= 1.05


DIGESTS = """
from distmuon.bricks import ParamSpec
from distmuon.planner import make_plan
specs = [ParamSpec("a", (12, 4), "adamw"), ParamSpec("b", (3, 4, 5), "muon", (1, 3)), ParamSpec("c", (9, 70), "muon")]
for way in (("flat", "auto"), ("balanced", "scatter"), ("balanced", "owner"), ("team", "auto")):
    print(make_plan(specs, 3, way[0], 40, way[1]).digest)
"""


def test_digest_does_not_depend_on_the_process() -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True)
    specs = [
        ParamSpec("a", (12, 4), "adamw"),
        ParamSpec("b", (3, 4, 5), "muon", (1, 3)),
        ParamSpec("c", (9, 70), "muon"),
    ]
    ways: Any = (("flat", "auto"), ("balanced", "scatter"), ("balanced", "owner"), ("team", "auto"))
    found = [make_plan(specs, 3, policy, 40, transport).digest for policy, transport in ways]
    assert done.stdout.split() == found
    assert len(set(found)) == 4
