"""Replicas counted once: a mesh of replicas and shards is one group of ranks that share all work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.placed import Job, digest, optimizer, parameters, step
from tests.ranks import RankPool

SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "embed": ((30, 8), "adamw"),
    "up": ((24, 8), "muon"),
    "down": ((8, 24), "muon"),
    "experts": ((3, 12, 8), "muon"),
    "square": ((16, 16), "muon"),
    "norm": ((11,), "adamw"),
}
JOB = Job(SHAPES, ns={"dtype": "float32", "kernels": "torch"}, clip=1.0, steps=3)


def run(rank: int, world: int, group: Any, mesh: tuple[int, ...], named: bool, policy: str) -> dict[str, Any]:
    """Train on a mesh, or on the group without one."""
    names = ("replicate", "shard", "third")[: len(mesh)] if named else None
    given = init_device_mesh("cpu", mesh, mesh_dim_names=names) if mesh else group
    job = Job(SHAPES, policy, ns=JOB.ns, clip=JOB.clip)
    params = parameters(job)
    opt = optimizer(params, job, given)
    digests, flops = [], 0
    for number in range(JOB.steps):
        with FlopCounterMode(display=False) as counter:
            step(params, opt, job, number, rank)
        flops = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
        digests.append(digest(params))
    (plan,) = opt.plans
    return {
        "digests": digests,
        "flops": flops,
        "planned": plan.newton_schulz_flops(rank),
        "once": plan.flops_once,
        "world": plan.world,
        "state": opt.state_bytes(),
        "wire": opt.traffic.wire_bytes(),
        "digest": plan.digest,
    }


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (1, 4), (4,), (1, 2, 2)], ids=str)
def test_a_mesh_is_its_ranks(pool: RankPool, mesh: tuple[int, ...]) -> None:
    """Newton-Schulz of every matrix once over all replicas, the same bits, bytes and state as on a plain group."""
    ranks = pool.run(4, run, mesh, True, "balanced")
    plain = pool.run(4, run, (), True, "balanced")
    assert ranks == plain
    assert sum(answer["flops"] for answer in ranks) == ranks[0]["once"]
    assert all(answer["flops"] == answer["planned"] for answer in ranks)
    assert {answer["world"] for answer in ranks} == {4}
    assert len({tuple(answer["digests"]) for answer in ranks}) == 1
    numel = sum(torch.Size(shape).numel() for shape, _ in SHAPES.values())
    assert sum(answer["state"] for answer in ranks) < 2 * 4 * numel


@pytest.mark.parametrize("policy", ["flat", "team"])
def test_a_mesh_under_every_policy(pool: RankPool, policy: str) -> None:
    assert pool.run(4, run, (2, 2), True, policy) == pool.run(4, run, (), True, policy)


def test_a_mesh_without_names(pool: RankPool) -> None:
    assert pool.run(4, run, (2, 2), False, "balanced") == pool.run(4, run, (), True, "balanced")


def twice(rank: int, world: int, group: Any) -> list[str]:
    """Two optimizers on one mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    digests = []
    for _ in range(2):
        params = parameters(JOB)
        opt = optimizer(params, JOB, mesh)
        step(params, opt, JOB, 0, rank)
        digests.append(digest(params))
    return digests


def test_two_optimizers_on_one_mesh(pool: RankPool) -> None:
    (digests,) = {tuple(found) for found in pool.run(4, twice)}
    assert len(set(digests)) == 1
