"""What a plan says of itself, beside sums over its elements one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmuon import planner
from distmuon.bricks import Matrix, ParamSpec
from distmuon.ns_settings import NewtonSchulz
from distmuon.placement import Piece
from distmuon.plan import BucketPlan, Part, Plan, ring_bytes
from tests.unit.test_placement import HYPOTHESIS, elementwise, specs

matrix = st.tuples(st.tuples(st.integers(1, 6), st.integers(1, 30)), st.just("muon"))
models = st.lists(st.one_of(elementwise, matrix), min_size=1, max_size=6)
ways = st.sampled_from([("flat", "scatter"), ("balanced", "scatter"), ("balanced", "owner"), ("team", "owner")])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    policy, transport = draw(ways)
    world, bucket = draw(st.integers(1, 5)), draw(st.integers(1, 120))
    ns = NewtonSchulz(form="plain")
    return planner.make_plan(specs(draw(models)), world, policy, bucket, transport, ns=ns)


@HYPOTHESIS
@given(plans(), st.sampled_from([2, 4]))
def test_sums_over_ranks_and_matrices(plan: Plan, itemsize: int) -> None:
    ranks = range(plan.world)
    held = [sum(bucket.lengths[rank] for bucket in plan.buckets) for rank in ranks]
    assert [plan.shard_numel(rank) for rank in ranks] == held
    assert plan.padding == sum(held) - sum(spec.numel for spec in plan.params)
    for bucket in plan.buckets:
        assert bucket.numel == sum(bucket.lengths)
        assert bucket.edges == tuple(sum(bucket.lengths[:rank]) for rank in range(plan.world + 1))
        assert bucket.even == all(length == bucket.lengths[0] for length in bucket.lengths)
        assert bucket.cut == tuple(m for m in bucket.matrices if len(m.holders) > 1 and not m.slices)
        assert bucket.params == tuple(sorted({p.param for shard in bucket.pieces for p in shard}))
    flops = [sum(w for m in plan.matrices for h, w in zip(m.holders, m.work, strict=True) if h == r) for r in ranks]
    assert [plan.newton_schulz_flops(rank) for rank in ranks] == flops
    assert plan.busiest_over_mean == pytest.approx(max(flops) / (sum(flops) / plan.world) if sum(flops) else 1.0)
    assert plan.shard_bytes(itemsize) == sum(ring_bytes(b.numel * itemsize, plan.world) for b in plan.buckets)
    kinds = [spec.kind for spec in plan.params]
    second = [sum(p.length for b in plan.buckets for p in b.pieces[r] if kinds[p.param] == "adamw") for r in ranks]
    master = 1 if itemsize < 4 else 0
    assert [plan.state_bytes(rank, itemsize) for rank in ranks] == [
        4 * (numel * (1 + master) + extra) for numel, extra in zip(held, second, strict=True)
    ]


@HYPOTHESIS
@given(plans())
def test_parts_are_the_elements_of_a_matrix_in_a_shard(plan: Plan) -> None:
    for bucket in plan.buckets:
        for rank, shard in enumerate(bucket.pieces):
            for matrix in bucket.matrices:
                parts = bucket.parts(rank, matrix)
                if matrix.team:
                    mine = [p for p in shard if p.param == matrix.param and matrix.start <= p.start < matrix.end]
                    assert parts == [Part(p.offset, 0, p.length) for p in mine]
                    continue
                found = {part.offset + i: part.within + i for part in parts for i in range(part.length)}
                assert all(part.length > 0 for part in parts)
                assert found == {
                    piece.offset + i: piece.start + i - matrix.start
                    for piece in shard
                    for i in range(piece.length)
                    if piece.param == matrix.param and matrix.start <= piece.start + i < matrix.end
                }


def test_every_piece_of_a_team_counts() -> None:
    """Slices of two matrices of one parameter in one shard, the other matrix's first and last."""
    shard = (Piece(0, 0, 4, 0, 2, 8), Piece(0, 16, 6, 4, 2, 8), Piece(0, 4, 2, 10, 2, 8))
    first = Matrix(0, 0, 2, 8, holders=(0, 1), slices=(4, 4))
    second = Matrix(0, 16, 2, 8, holders=(0, 1), slices=(4, 4))
    bucket = BucketPlan((12, 0), (shard, ()), (first, second))
    assert bucket.parts(0, first) == [Part(0, 0, 4), Part(10, 0, 2)]
    assert bucket.parts(0, second) == [Part(4, 0, 6)]
    assert bucket.parts(1, first) == []


@pytest.mark.parametrize(("payload", "world", "sent"), [(10, 1, 0), (10, 2, 5), (10, 4, 7), (0, 3, 0), (12, 3, 8)])
def test_ring_bytes(payload: int, world: int, sent: int) -> None:
    assert ring_bytes(payload, world) == sent


@HYPOTHESIS
@given(plans(), st.integers(1, 4))
def test_completion_sends_what_others_need(plan: Plan, itemsize: int) -> None:
    sent: list[Any] = [0] * plan.world
    for bucket in plan.buckets:
        for matrix in bucket.matrices:
            for rank in matrix.holders if matrix.cut else ():
                held = sum(part.length for part in bucket.parts(rank, matrix))
                sent[rank] += itemsize * held * (len(matrix.holders) - 1)
    assert [plan.completion_bytes(rank, itemsize) for rank in range(plan.world)] == sent


def test_a_matrix_in_two_buckets_is_orthogonalized_once_in_the_books() -> None:
    """Pieces of one matrix may lie in several buckets; its cost is counted once, whoever computes it."""
    one = Matrix(0, 0, 2, 8, cost=5.0, holders=(0,), work=(5.0,))
    other = Matrix(0, 16, 2, 8, cost=7.0, holders=(1,), work=(7.0,))
    buckets = tuple(BucketPlan((16, 16), ((), ()), matrices) for matrices in ((one,), (one, other)))
    plan = Plan("flat", "scatter", 2, 1, (ParamSpec("w", (2, 2, 8), "muon"),), buckets)
    assert plan.matrices == (one, one, other)
    assert plan.flops_once == 12.0
    assert [plan.newton_schulz_flops(rank) for rank in (0, 1)] == [10.0, 7.0]
    assert plan.busiest_over_mean == 10.0 / 8.5
