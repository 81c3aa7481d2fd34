"""Every element has one place, whatever the policy, the transport, the splits and the number of ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given

from distmuon.bricks import ParamSpec
from distmuon.ns_settings import NewtonSchulz
from distmuon.plan import BucketPlan, Plan
from distmuon.planner import make_plan
from tests.unit.plans import (
    HYPOTHESIS,
    WAYS,
    blocks_of_rows,
    bucket_sizes,
    costs,
    elements,
    flops_by_rank,
    held,
    models,
    products,
    specs,
    ways,
    worlds,
)


def filled(bucket: BucketPlan) -> int:
    """Elements without padding."""
    return sum(piece.length for shard in bucket.pieces for piece in shard)


def planned(model: Any, world: int, way: tuple[Any, Any], bucket: int) -> Plan:
    return make_plan(model, world, way[0], bucket, way[1])


@HYPOTHESIS
@given(models, worlds, ways, bucket_sizes)
def test_every_element_lies_in_exactly_one_piece(model: Any, world: int, way: Any, bucket: int) -> None:
    plan = planned(model, world, way, bucket)
    found: Counter[tuple[int, int]] = Counter()
    for b in plan.buckets:
        assert len(b.pieces) == len(b.lengths) == world
        for shard in b.pieces:
            for piece in shard:
                assert piece.length > 0
                found.update((piece.param, i) for i in elements(piece))
    assert found == Counter((index, i) for index, spec in enumerate(model) for i in range(spec.numel))
    assert plan.numel == found.total()


@HYPOTHESIS
@given(models, worlds, ways, bucket_sizes)
def test_shards_have_no_gaps_and_the_padding_they_admit(model: Any, world: int, way: Any, bucket: int) -> None:
    plan = planned(model, world, way, bucket)
    for b in plan.buckets:
        for shard, length in zip(b.pieces, b.lengths, strict=True):
            ends = [piece.offset + piece.length for piece in shard]
            assert [piece.offset for piece in shard] == [0, *ends[:-1]][: len(shard)]
            assert ends[-1:] <= [length] if plan.transport == "scatter" else (ends or [0])[-1] == length
        assert b.numel == sum(b.lengths)
        assert 0 <= b.numel - filled(b) < (world if plan.transport == "scatter" else 1)
        assert b.even == (len(set(b.lengths)) == 1)
        assert b.even or plan.transport == "owner"
        assert b.edges == tuple(sum(b.lengths[:rank]) for rank in range(world + 1))
    assert plan.padding == sum(b.numel - filled(b) for b in plan.buckets)
    for rank in range(world):
        assert plan.shard_numel(rank) == sum(b.lengths[rank] for b in plan.buckets)


@HYPOTHESIS
@given(models, worlds, ways, bucket_sizes)
def test_matrices_and_who_holds_them(model: Any, world: int, way: Any, bucket: int) -> None:
    """Holders are the ranks with elements of the matrix; each orthogonalizes it, or its slice of it."""
    plan = planned(model, world, way, bucket)
    wanted = [(index, *block) for index, spec in enumerate(model) for block in blocks_of_rows(spec)]
    assert sorted((m.param, m.start, m.rows, m.cols) for m in plan.matrices) == wanted
    for b in plan.buckets:
        for m in b.matrices:
            shares = {rank: held(b, rank, m) for rank in range(world)}
            assert m.holders == tuple(rank for rank, own in shares.items() if own)
            assert sorted(i for own in shares.values() for i in own) == list(range(m.numel))
            assert (m.cut, m.team) == (len(m.holders) > 1 and not m.slices, bool(m.slices))
            assert len(m.work) == len(m.holders)
            assert not m.cut or plan.transport == "scatter"
            assert not m.team or plan.policy == "team"
            if not m.team:
                assert (set(m.work), m.rounds) == ({m.cost}, 0)
            for rank in range(world):
                parts = b.parts(rank, m)
                assert sum(part.length for part in parts) == len(shares[rank])
                if not m.team:
                    assert [part.within + i for part in parts for i in range(part.length)] == shares[rank]


@HYPOTHESIS
@given(models, worlds, ways, bucket_sizes)
def test_newton_schulz_flops_of_ranks_and_once(model: Any, world: int, way: Any, bucket: int) -> None:
    """Counted product by product; nothing is computed twice where matrices stay whole."""
    plan = make_plan(model, world, way[0], bucket, way[1], NewtonSchulz(form="plain"))
    once = sum(costs(model, [1] * 5))
    assert plan.flops_once == once
    if plan.transport == "owner" and plan.policy == "balanced":
        assert sum(flops_by_rank(plan)) == once
    again = dict.fromkeys(plan.matrices, 0)
    for b in plan.buckets:
        for m in b.matrices:
            for rank, work in zip(m.holders, m.work, strict=True):
                own = len(held(b, rank, m)) // m.short if m.team else m.long
                assert work == products(m.short, own, [1] * 5)
                again[m] += 1
    assert sum(flops_by_rank(plan)) == sum(sum(m.work) for m in plan.matrices)
    assert all(number == len(m.holders) for m, number in again.items())


@HYPOTHESIS
@given(models, worlds, ways, bucket_sizes)
def test_buckets_close_when_full_and_follow_backward(model: Any, world: int, way: Any, bucket: int) -> None:
    """A parameter lies in one bucket; only equal shards of whole matrices may make a bucket wait for more."""
    plan = planned(model, world, way, bucket)
    members = [index for b in plan.buckets for index in reversed(b.params)]
    assert members == [i for i in reversed(range(len(model))) if model[i].numel]
    for b in plan.buckets[:-1]:
        assert filled(b) >= bucket
    if plan.policy == "flat" or plan.transport == "owner":
        for b in plan.buckets:
            assert filled(b) - model[b.params[0]].numel < bucket


@HYPOTHESIS
@given(models, worlds, bucket_sizes)
def test_flat_shards_are_runs_of_the_concatenated_parameters(model: Any, world: int, bucket: int) -> None:
    for b in make_plan(model, world, "flat", bucket).buckets:
        order = [(-piece.param, i) for shard in b.pieces for piece in shard for i in elements(piece)]
        assert order == sorted(order)
        share = -(-len(order) // world)
        sizes = [sum(piece.length for piece in shard) for shard in b.pieces]
        assert sizes == [min(share, max(0, len(order) - share * rank)) for rank in range(world)]


@HYPOTHESIS
@given(models, worlds, bucket_sizes)
def test_auto_takes_one_of_the_two_transports_and_never_cuts(model: Any, world: int, bucket: int) -> None:
    auto, scatter, owner = (
        planned(model, world, ("balanced", transport), bucket) for transport in ("auto", "scatter", "owner")
    )
    assert (auto.transport, auto.buckets) in [(p.transport, p.buckets) for p in (scatter, owner)]
    assert not any(m.cut for m in auto.matrices)


@HYPOTHESIS
@given(models, worlds, ways, bucket_sizes)
def test_bytes_follow_from_the_placement(model: Any, world: int, way: Any, bucket: int) -> None:
    plan = planned(model, world, way, bucket)
    assert plan.shard_bytes(2) == sum(2 * b.numel * (world - 1) // world for b in plan.buckets)
    for rank in range(world):
        sent = moments = 0
        for b in plan.buckets:
            sent += sum((len(m.holders) - 1) * len(held(b, rank, m)) for m in b.matrices if m.cut)
            second = (piece.length for piece in b.pieces[rank] if model[piece.param].kind == "adamw")
            moments += b.lengths[rank] + sum(second)
        assert plan.completion_bytes(rank, 2) == 2 * sent
        assert plan.state_bytes(rank, 4) == 4 * moments
        assert plan.state_bytes(rank, 2) == 4 * (moments + plan.shard_numel(rank))


FUSED = ParamSpec("qkv", (12, 5), "muon", (4, 4, 4))
BASE: dict[str, Any] = {"params": [ParamSpec("gain", (16,), "adamw"), FUSED], "world": 2, "transport": "owner"}
OTHERS: dict[str, dict[str, Any]] = {
    "transport": {"transport": "scatter"},
    "policy": {"policy": "team"},
    "split": {"params": [BASE["params"][0], ParamSpec("qkv", (12, 5), "muon", (6, 6))]},
    "no split": {"params": [BASE["params"][0], ParamSpec("qkv", (12, 5), "muon")]},
    "world": {"world": 3},
    "order": {"params": BASE["params"][::-1]},
    "name": {"params": [ParamSpec("bias", (16,), "adamw"), FUSED]},
    "shape": {"params": [ParamSpec("gain", (4, 4), "adamw"), FUSED]},
    "kind": {"params": [ParamSpec("gain", (16,), "adamw"), ParamSpec("qkv", (12, 5), "adamw")]},
    "bucket": {"bucket_numel": 10},
}


@pytest.mark.parametrize("what", OTHERS)
def test_digest_shows_what_matters(what: str) -> None:
    assert make_plan(**{**BASE, **OTHERS[what]}).digest != make_plan(**BASE).digest
    assert make_plan(**BASE).digest == make_plan(**BASE).digest


def test_digest_shows_policy_and_transport_that_place_alike() -> None:
    model = specs([((16,), "adamw"), ((5, 7), "muon")])
    found = [planned(model, 1, way, 100) for way in WAYS]
    assert len({plan.buckets for plan in found}) == 1
    assert len({plan.digest for plan in found}) == len({(plan.policy, plan.transport) for plan in found}) == 4


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_place(way: tuple[Any, Any]) -> None:
    assert planned([], 3, way, 10).buckets == ()
    assert planned(specs([((0,), "adamw"), ((0, 4), "muon")]), 3, way, 10).buckets == ()
    assert [planned([], 3, way, 10).newton_schulz_flops(rank) for rank in range(3)] == [0, 0, 0]
