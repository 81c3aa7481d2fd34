"""Traffic and memory, counted by a tracer of our own below torch.distributed, on the process group."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import distmuon
from tests.ranks import ThreadGroup, run_threads

GUARD_BYTES = 256
FAMILIES = {
    "reduce_scatter_single": "reduce_scatter",
    "all_gather_single": "all_gather",
    "allreduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}


@dataclass(frozen=True)
class Call:
    """One collective: what it is, where it was issued, the bytes of its buffer and those a ring sends."""

    family: str
    phase: str
    size: int
    wire: float


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size(item) for item in value) if isinstance(value, list | tuple) else 0


class Tracer(threading.local):
    """The collectives that this rank (a thread) issued, with the phase of the step it was in."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.phase = "construction"

    def record(self, name: str, group: ThreadGroup, args: tuple[Any, ...]) -> None:
        """Ring model: (d - 1) / d of the buffer, twice for an all-reduce; all-to-all what is not kept."""
        world = group.size()
        size = max(_size(args[0]), _size(args[1]) if len(args) > 1 else 0)
        wire = size * (world - 1) / world
        if name == "allreduce":
            wire *= 2
        elif name == "all_to_all_single":
            size, splits = _size(args[1]), args[3]
            wire = size * (1 - splits[group.rank()] / sum(splits)) if sum(splits) else 0.0
        self.calls.append(Call(FAMILIES.get(name, name), self.phase, size, wire))


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    trace = Tracer()
    monkeypatch.setattr(ThreadGroup, "observer", staticmethod(trace.record))
    return trace


SHAPES = {
    "embed": (96, 12),
    "w1": (24, 12),
    "w2": (12, 24),
    "norm": (24,),
    "w3": (24, 24),
    "experts": (4, 12, 12),
    "head": (96, 12),
}
"""Every size is a multiple of 2, 3 and 4, so equal shards need no padding."""
MATRICES = ("w1", "w2", "w3", "experts")
TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES.values())


@dataclass
class Measured:
    """What one rank sent in one step, and what it holds."""

    calls: list[Call]
    traffic: float
    state: int
    buckets: int
    crossing: int


def measure(
    rank: int,
    world: int,
    trace: Tracer,
    policy: Literal["balanced", "flat"],
    dtype: torch.dtype,
    reduce: torch.dtype,
    muon: bool,
    bucket_mb: float,
    transport: Literal["scatter", "owner"],
) -> Measured:
    """One step after a first one that warms up; all gradients present."""
    source = torch.Generator().manual_seed(3)
    params = {name: Parameter(torch.randn(s, generator=source).to(dtype)) for name, s in SHAPES.items()}
    named = list(params.items())
    matrices = [(name, p) for name, p in named if muon and name in MATRICES]
    others = [(name, p) for name, p in named if not (muon and name in MATRICES)]
    groups: list[dict[str, Any]] = [{"params": others, "kind": "adamw"}]
    if matrices:
        groups.insert(0, {"params": matrices, "kind": "muon"})
    settings = {"policy": policy, "transport": transport, "reduce_dtype": reduce, "bucket_mb": bucket_mb}
    opt = distmuon.DistMuon(groups, max_grad_norm=1.0, **settings)  # type: ignore[arg-type]
    for _ in range(2):
        trace.calls.clear()
        opt.traffic.reset()
        trace.phase = "backward"
        torch.stack([(p.float() * 0.5).square().sum() for p in params.values()]).sum().backward()
        trace.phase = "step"
        opt.step()
        trace.phase = "after"
        opt.zero_grad()
    return Measured(
        list(trace.calls),
        opt.traffic.wire_bytes(),
        opt.state_bytes(),
        sum(len(plan.buckets) for plan in opt.plans),
        sum((len(m.holders) - 1) * m.rows * m.cols for plan in opt.plans for m in plan.matrices),
    )


def measured(
    trace: Tracer,
    world: int,
    policy: Literal["balanced", "flat"] = "balanced",
    dtype: torch.dtype = torch.float32,
    reduce: torch.dtype = torch.float32,
    muon: bool = True,
    bucket_mb: float = 0.004,
    transport: Literal["scatter", "owner"] = "scatter",
) -> list[Measured]:
    return run_threads(world, measure, trace, policy, dtype, reduce, muon, bucket_mb, transport)


def adamw_zero1(world: int, dtype: torch.dtype, reduce: torch.dtype) -> float:
    """Bytes a rank sends per step under AdamW ZeRO-1: gradients reduce-scattered, parameters all-gathered."""
    return TOTAL * (reduce.itemsize + dtype.itemsize) * (world - 1) / world


def bulk(calls: list[Call]) -> list[Call]:
    """All but the guard, which is the one small all-reduce of a step."""
    guards = [call for call in calls if call.family == "all_reduce" and call.size <= GUARD_BYTES]
    assert len(guards) <= 1
    return [call for call in calls if call not in guards]


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("bucket_mb", [0.004, 25.0])
@pytest.mark.parametrize(("dtype", "reduce"), DTYPES, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_balanced_sends_what_adamw_sends(
    tracer: Tracer, world: int, dtype: torch.dtype, reduce: torch.dtype, bucket_mb: float
) -> None:
    """Equal to the formula, and to a run in which every parameter is AdamW's."""
    muon = measured(tracer, world, "balanced", dtype, reduce, True, bucket_mb)
    adamw = measured(tracer, world, "balanced", dtype, reduce, False, bucket_mb)
    for rank in range(world):
        sent = sum(call.wire for call in bulk(muon[rank].calls))
        assert sent == pytest.approx(adamw_zero1(world, dtype, reduce), rel=1e-12)
        assert sent == pytest.approx(sum(call.wire for call in bulk(adamw[rank].calls)), rel=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_owners_send_what_adamw_sends_on_average(tracer: Tracer, world: int) -> None:
    """Without a reduce-scatter: every rank's piece is sent to it, and broadcast by it."""
    ranks = measured(tracer, world, transport="owner")
    sent = [sum(call.wire for call in bulk(rank.calls)) for rank in ranks]
    assert sum(sent) == pytest.approx(world * adamw_zero1(world, torch.float32, torch.float32), rel=1e-12)
    if world > 1:
        families = {call.family for call in bulk(ranks[0].calls)}
        assert families >= {"all_to_all", "broadcast"}


@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_traffic_counts_every_collective(tracer: Tracer, world: int, policy: Literal["balanced", "flat"]) -> None:
    for rank in measured(tracer, world, policy):
        assert rank.traffic == pytest.approx(sum(call.wire for call in rank.calls), rel=1e-12)


@pytest.mark.parametrize("bucket_mb", [0.004, 25.0])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_number_and_place_of_collectives(
    tracer: Tracer, world: int, policy: Literal["balanced", "flat"], bucket_mb: float
) -> None:
    """One reduce-scatter per bucket, in backward; one all-gather per bucket and one guard, in step."""
    for rank in measured(tracer, world, policy, bucket_mb=bucket_mb):
        # At 4 ranks, balanced has to merge buckets to level its shards.
        fewest = 2 if policy == "balanced" and world == 4 else 3
        assert rank.buckets >= fewest if bucket_mb < 1 else rank.buckets == 1
        count = {
            (family, phase): sum((call.family, call.phase) == (family, phase) for call in rank.calls)
            for family in {call.family for call in rank.calls}
            for phase in ("backward", "step", "after")
        }
        assert count.pop(("reduce_scatter", "backward")) == rank.buckets
        assert count.pop(("all_gather", "step")) == rank.buckets
        assert count.pop(("all_reduce", "step")) == 1
        exchanged = count.pop(("all_to_all", "step"), 0)
        assert exchanged <= (rank.buckets if policy == "flat" else 0)
        assert not any(count.values())


def test_one_rank_sends_nothing(tracer: Tracer) -> None:
    (alone,) = measured(tracer, 1)
    assert sum(call.wire for call in alone.calls) == 0
    assert alone.traffic == 0


@pytest.mark.parametrize("world", [2, 3, 4])
def test_flat_pays_only_for_cut_matrices(tracer: Tracer, world: int) -> None:
    """All ranks together send 2 bytes per element and further holder of a matrix that crosses an edge."""
    ranks = measured(tracer, world, "flat")
    extra = sum(call.wire for rank in ranks for call in bulk(rank.calls))
    extra -= world * adamw_zero1(world, torch.float32, torch.float32)
    assert extra == pytest.approx(2 * ranks[0].crossing, rel=1e-12)
    assert (extra > 0) == (world > 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_state_is_sharded_without_copies(
    tracer: Tracer, world: int, policy: Literal["balanced", "flat"], dtype: torch.dtype
) -> None:
    """All ranks together hold 4 bytes a Muon element, 8 an AdamW element, 4 more for 16-bit parameters."""
    matrices = sum(torch.Size(SHAPES[name]).numel() for name in MATRICES)
    master = 4 if dtype.itemsize == 2 else 0
    ranks = measured(tracer, world, policy, dtype)
    assert sum(rank.state for rank in ranks) == 4 * matrices + 8 * (TOTAL - matrices) + master * TOTAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_rank_holds_its_share_of_matrices(world: int, dtype: torch.dtype) -> None:
    """Equal matrices, as many as divide evenly: exactly 4/d bytes per element, 8/d with master weights."""

    def body(rank: int, ranks: int) -> int:
        matrices = [(f"w{i}", Parameter(torch.zeros(8, 8, dtype=dtype))) for i in range(12)]
        opt = distmuon.DistMuon([{"params": matrices, "kind": "muon"}])
        return int(opt.state_bytes())

    per_element = 4 if dtype is torch.float32 else 8
    assert run_threads(world, body) == [12 * 64 * per_element // world] * world


def test_no_sync_sends_nothing(tracer: Tracer) -> None:
    def body(rank: int, world: int) -> int:
        w = Parameter(torch.ones(8, 8))
        opt = distmuon.DistMuon([{"params": [("w", w)], "kind": "muon"}])
        tracer.calls.clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(opt.no_sync())
            w.sum().backward()
        return len(tracer.calls)

    assert run_threads(2, body) == [0, 0]
