"""What a plan says in advance, bytes, FLOPs and state, is what a step then takes, to the last of them."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import distmuon
from distmuon.plan import Plan
from tests.distributed.placed import Job, advance, gradients, optimizer, parameters
from tests.ranks import ThreadGroup, run_threads

DENSE: dict[str, tuple[tuple[int, ...], str]] = {
    "embed": ((50, 12), "adamw"),
    "qkv": ((36, 12), "muon"),
    "o": ((12, 12), "muon"),
    "norm": ((12,), "adamw"),
    "up": ((44, 12), "muon"),
    "down": ((12, 44), "muon"),
    "odd": ((5, 7), "muon"),
    "large": ((40, 32), "muon"),
    "head": ((50, 12), "adamw"),
}
EXPERTS: dict[str, tuple[tuple[int, ...], str]] = {"up": ((3, 20, 12), "muon"), "down": ((3, 12, 20), "muon")}
MOE = {"embed": DENSE["embed"], "o": DENSE["o"], **{f"experts.{n}": shape for n, shape in EXPERTS.items()}}
MOE |= {"bias": ((9,), "adamw"), "large": DENSE["large"]}

JOBS = {
    "dense": Job(DENSE, splits={"qkv": 3}, ns={"dtype": "float32", "kernels": "torch"}),
    "dense bf16": Job(DENSE, ns={"kernels": "torch"}, dtype="bfloat16", reduce_dtype="bfloat16", bucket_mb=25.0),
    "gram": Job(DENSE, ns={"form": "gram", "kernels": "torch"}, dtype="bfloat16"),
    "experts": Job(MOE, ns={"kernels": "torch"}, dtype="bfloat16"),
    "expert groups": Job(MOE, ns={"kernels": "torch"}, experts=("experts.up", "experts.down")),
}
WAYS = [("balanced", "scatter"), ("balanced", "owner"), ("flat", "auto"), ("team", "auto")]
# On eight ranks those that say most; threads take their time.
RUNS = [(world, name) for world in (1, 2, 3, 4, 8) for name in JOBS if world < 8 or name in ("gram", "expert groups")]
GUARD_BYTES = 3 * 8

Costs = dict[tuple[str, int, str], tuple[int, int]]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """The first float32 products of a process are tried out, which counts."""
    distmuon.orthogonalize(torch.ones(4, 4), distmuon.NewtonSchulz(dtype="float32"))


def expert_parallel(rank: int, world: int) -> Any:
    """Own expert-data-parallel group: every second rank, or one rank at odd worlds."""
    size, own = 2 if world % 2 == 0 else world, None
    for first in range(size):
        group = dist.new_group(list(range(first, world, size)))
        own = group if rank % size == first else own
    return own


@dataclass
class Taken:
    """What a step of a rank took, and what was planned."""

    plans: list[Plan]
    ranks: list[int]
    """This rank's place in the group of each plan."""
    costs: Costs
    launched: int
    """Reduce-scatters issued in backward."""
    flops: int
    state: int


def measure(rank: int, world: int, job: Job) -> Taken:
    params = parameters(job)
    own = expert_parallel(rank, world) if job.experts else None
    opt = optimizer(params, job, expert_groups={"ep": own}) if job.experts else optimizer(params, job)
    opt.traffic.reset()
    advance(params, opt, [gradients(job, 0, 0, rank)])
    assert {key.collective for key in opt.traffic.costs} <= {"reduce_scatter"}
    calls = sum(cost.calls for cost in opt.traffic.costs.values())
    with FlopCounterMode(display=False) as counter:
        opt.step()
    costs = {tuple(key): (cost.calls, cost.wire) for key, cost in opt.traffic.costs.items()}
    places = [dist.get_rank(own) if job.experts and plan.world < world else rank for plan in opt.plans]
    return Taken(opt.plans, places, costs, calls, counter.get_total_flops(), opt.state_bytes())


def planned_costs(taken: Taken, job: Job, world: int) -> Counter[tuple[str, int, str]]:
    """Bytes of every collective as the plans say them; a guard besides."""
    wire: Counter[tuple[str, int, str]] = Counter()
    pieces = str(job.ns.get("dtype", "bfloat16"))
    for plan, rank in zip(taken.plans, taken.ranks, strict=True):
        d = plan.world
        wire["reduce_scatter", d, job.reduce_dtype] += plan.shard_bytes(getattr(torch, job.reduce_dtype).itemsize)
        wire["all_gather", d, job.dtype] += plan.shard_bytes(getattr(torch, job.dtype).itemsize)
        itemsize = getattr(torch, pieces).itemsize
        # A team's agreement on a scale is an all-reduce; all else that a plan adds are all-to-alls.
        agreement = sum(2 * 4 * sum(m.team for m in b.matrices) * (d - 1) // d for b in plan.buckets)
        wire["all_reduce", d, "float32"] += agreement
        exchanged = plan.completion_bytes(rank, itemsize) + plan.team_bytes(rank, itemsize) - agreement
        wire["all_to_all", d, pieces] += exchanged
    wire["all_reduce", world, "float64"] += 2 * GUARD_BYTES * (world - 1) // world
    return +wire


@pytest.mark.parametrize(("policy", "transport"), WAYS)
@pytest.mark.parametrize(("world", "name"), RUNS)
def test_planned_is_measured(world: int, policy: str, transport: str, name: str) -> None:
    job = replace(JOBS[name], policy=policy, transport=transport)
    ranks = run_threads(world, measure, job)
    for taken in ranks:
        plans = list(zip(taken.plans, taken.ranks, strict=True))
        assert Counter({key: wire for key, (_, wire) in taken.costs.items() if wire}) == planned_costs(
            taken, job, world
        )
        assert taken.flops == sum(plan.newton_schulz_flops(rank) for plan, rank in plans)
        itemsize = getattr(torch, job.dtype).itemsize
        assert taken.state == sum(plan.state_bytes(rank, itemsize) for plan, rank in plans)
        check_calls(taken, policy)
    once = {plan.params: plan.flops_once * (world // plan.world) for plan in ranks[0].plans}
    total = sum(taken.flops for taken in ranks)
    if policy == "balanced" and not any(m.cut for plan in ranks[0].plans for m in plan.matrices):
        assert total == sum(once.values())
    else:
        assert total >= sum(once.values())


def check_calls(taken: Taken, policy: str) -> None:
    """Every reduce-scatter in backward; with whole matrices two collectives a bucket, and one for the decision."""
    buckets = sum(len(plan.buckets) for plan in taken.plans if plan.world > 1)
    calls = {"reduce_scatter": 0, "all_gather": 0}
    for (collective, *_), (number, _) in taken.costs.items():
        calls[collective] = calls.get(collective, 0) + number
    assert calls["reduce_scatter"] == taken.launched == calls["all_gather"] == buckets
    cut = any(m.cut for plan in taken.plans for m in plan.matrices)
    if policy == "balanced" and not cut:
        assert sum(calls.values()) <= 2 * buckets + 1


def test_the_jobs_show_what_they_should() -> None:
    """Cut matrices, teams of uneven slices, several buckets, two groups of ranks."""
    flat, team, groups = (
        run_threads(4, measure, replace(JOBS[name], policy=policy))[0].plans
        for name, policy in (("dense", "flat"), ("dense", "team"), ("expert groups", "balanced"))
    )
    assert any(m.cut for m in flat[0].matrices)
    assert any(len(set(m.slices)) > 1 for m in team[0].matrices)
    assert min(len(flat[0].buckets), len(team[0].buckets)) > 2
    assert sorted(plan.world for plan in groups) == [2, 4]


@pytest.mark.parametrize("policy", ["balanced", "team"])
def test_dense_matrices_are_levelled_with_experts(policy: str) -> None:
    """In both expert groups of two ranks one has the only expert, so the two others get the dense matrices."""
    shapes = {"w": ((24, 24), "muon"), "experts.w": ((1, 24, 24), "muon"), "v": ((24, 24), "muon")}
    job = Job(shapes, policy, "owner", ns=JOBS["dense"].ns, experts=("experts.w",))
    assert len({taken.flops for taken in run_threads(4, measure, job)}) == 1


class Sent(threading.local):
    """Bytes that a rank (a thread) really hands to others, as the process group sees them."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def record(self, name: str, group: ThreadGroup, args: tuple[Any, ...]) -> None:
        if name == "all_to_all_single":
            splits, item = args[3], args[1].element_size()
            self.sent["all_to_all"] += (sum(splits) - splits[group.rank()]) * item
        elif name == "broadcast":
            (tensor,) = args[0]
            root = args[1].rootRank == group.rank()
            self.sent["broadcast"] += (group.size() - 1) * tensor.nbytes if root else 0
        else:
            self.sent[name] += 1


def send(rank: int, world: int, trace: Sent, job: Job) -> tuple[Counter[str], int, int]:
    params = parameters(job)
    opt = optimizer(params, job)
    trace.sent.clear()
    advance(params, opt, [gradients(job, 0, 0, rank)])
    opt.step()
    return trace.sent, opt.plans[0].shard_bytes(4), len(opt.plans[0].buckets)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_shards_of_any_length_send_what_equal_ones_do(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Counted below the optimizer: all ranks together send d times the ring's bytes, each way."""
    trace = Sent()
    monkeypatch.setattr(ThreadGroup, "observer", staticmethod(trace.record))
    ranks = run_threads(world, send, trace, replace(JOBS["dense"], transport="owner"))
    numel = sum(torch.Size(shape).numel() for shape, _ in DENSE.values())
    for way in ("all_to_all", "broadcast"):
        assert sum(sent[way] for sent, _, _ in ranks) == 4 * numel * (world - 1)
    for sent, planned, buckets in ranks:
        assert 4 * numel * (world - 1) / world - buckets < planned <= 4 * numel * (world - 1) / world
        assert sent.keys() == {"all_to_all", "broadcast", "allreduce"}
        assert sent["allreduce"] == 1
