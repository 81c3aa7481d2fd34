"""Shards of any length: matrices whole on one rank, or in slices on a team where that takes work off the busiest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmuon.bricks import Kind, Matrix, ParamSpec, even_parts, starts
from distmuon.ns_settings import NewtonSchulz
from distmuon.owners import place_owners, team_runs, whole
from distmuon.placement import Run
from distmuon.plan import BucketPlan, Plan, Policy
from distmuon.planner import make_plan
from tests.unit.plans import (
    HYPOTHESIS,
    bucket_sizes,
    costs,
    flops_by_rank,
    held,
    models,
    products,
    specs,
    spread,
    worlds,
)

PLAIN = NewtonSchulz(form="plain")
GRAM = NewtonSchulz(form="gram")
IDLE = [0.0] * 4
"""Four ranks that have nothing to do yet."""
POLICIES: tuple[Policy, ...] = ("team", "balanced")


def teams(plan: Plan) -> list[tuple[BucketPlan, Matrix]]:
    return [(bucket, matrix) for bucket in plan.buckets for matrix in bucket.matrices if matrix.team]


@given(st.integers(0, 100), st.integers(1, 12))
def test_even_parts(total: int, parts: int) -> None:
    found = even_parts(total, parts)
    assert (sum(found), len(found), found) == (total, parts, sorted(found, reverse=True))
    assert max(found) - min(found) <= 1
    assert starts(found) == [sum(found[:i]) for i in range(parts)]


@HYPOTHESIS
@given(models, worlds, bucket_sizes)
def test_bricks_stay_whole_with_owners(model: Any, world: int, bucket: int) -> None:
    plan = make_plan(model, world, "balanced", bucket, "owner")
    assert plan.padding == 0
    for b in plan.buckets:
        for m in b.matrices:
            (owner,) = m.holders
            (part,) = b.parts(owner, m)
            assert (part.within, part.length) == (0, m.numel)
            assert held(b, owner, m) == list(range(m.numel))


@HYPOTHESIS
@given(models, worlds, bucket_sizes)
def test_owners_are_chosen_by_load(model: Any, world: int, bucket: int) -> None:
    """Longest processing time first over the whole model, whatever the buckets."""
    plan = make_plan(model, world, "balanced", bucket, "owner", PLAIN)
    ranks = [0] * world
    for cost in sorted(costs(model, [1] * 5), reverse=True):
        ranks[ranks.index(min(ranks))] += cost
    assert sorted(flops_by_rank(plan)) == sorted(ranks)


@HYPOTHESIS
@given(models, worlds, bucket_sizes)
def test_slices_of_a_team_cover_the_long_side_once(model: Any, world: int, bucket: int) -> None:
    """Every holder has whole rows of a tall matrix, or whole columns of a wide one; together they are the matrix."""
    for b, m in teams(make_plan(model, world, "team", bucket)):
        assert 1 < len(m.holders) <= min(world, m.long)
        assert len(set(m.holders)) == len(m.holders) == len(m.slices)
        assert sorted(m.slices) == sorted(even_parts(m.long, len(m.holders)))
        covered = []
        for rank, size in zip(m.holders, m.slices, strict=True):
            own = held(b, rank, m)
            tall = m.rows >= m.cols
            lines = sorted({i // m.cols if tall else i % m.cols for i in own})
            assert lines == list(range(lines[0], lines[0] + size))
            grid = [(r, c) for r in range(m.rows) for c in range(m.cols) if (r if tall else c) in lines]
            assert own == [r * m.cols + c for r, c in grid]
            (part,) = b.parts(rank, m)
            assert (part.within, part.length) == (0, m.short * size)
            covered += lines
        assert sorted(covered) == list(range(m.long))


@HYPOTHESIS
@given(models, worlds, bucket_sizes, st.sampled_from([PLAIN, GRAM]))
def test_work_of_a_team(model: Any, world: int, bucket: int, ns: NewtonSchulz) -> None:
    """Every holder pays for its slice and for all of X X^T; the largest slice decides the schedule for all."""
    segments = [1] * 5 if ns is PLAIN else [1, 2, 2]
    for _, m in teams(make_plan(model, world, "team", bucket, ns=ns)):
        assert m.work == tuple(products(m.short, size, segments) for size in m.slices)
        assert m.rounds == len(segments)
        assert m.cost == products(m.short, m.long, segments)


def test_a_team_has_one_schedule() -> None:
    """For 7 of 4 x 19's columns the Gram form is cheaper, for 6 it is not; all slices take what suits the largest."""
    plan = make_plan([ParamSpec("w", (4, 19), "muon")], 3, "team", 1)
    ((_, matrix),) = teams(plan)
    assert sorted(matrix.slices) == [6, 6, 7]
    assert matrix.rounds == 3
    assert matrix.work == tuple(products(4, size, [1, 2, 2]) for size in matrix.slices)
    assert products(4, 7, [1, 2, 2]) < products(4, 7, [1] * 5)
    assert products(4, 6, [1, 2, 2]) >= products(4, 6, [1] * 5)


@HYPOTHESIS
@given(models, worlds, bucket_sizes)
def test_teams_only_where_they_help_the_busiest_rank(model: Any, world: int, bucket: int) -> None:
    shared, alone = (make_plan(model, world, policy, bucket, "owner") for policy in POLICIES)
    if teams(shared):
        assert max(flops_by_rank(shared)) < max(flops_by_rank(alone))
    else:
        assert [b.pieces for b in shared.buckets] == [b.pieces for b in alone.buckets]


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32), (1, 64, 16)])
def test_one_large_matrix_keeps_more_ranks_busy(shape: tuple[int, ...]) -> None:
    shared, alone = (make_plan([ParamSpec("w", shape, "muon")], 4, policy, 1, "owner") for policy in POLICIES)
    ((_, matrix),) = teams(shared)
    assert len(matrix.holders) == 4
    assert not teams(alone)
    assert max(flops_by_rank(shared)) < 0.7 * max(flops_by_rank(alone))
    assert {shared.shard_numel(rank) for rank in range(4)} == {shared.numel // 4}


def test_equal_matrices_need_no_team() -> None:
    shared = make_plan(specs([((32, 32), "muon")] * 8), 4, "team", 1)
    assert not teams(shared)
    assert spread(shared) == 1.0


def test_a_single_line_is_never_cut() -> None:
    """A slice of a matrix with one column or row repeats nothing, a team larger than the long side cannot be."""
    shared = make_plan(specs([((1, 1), "muon"), ((1, 2), "muon")]), 4, "team", 1)
    assert all(len(m.holders) <= m.long for m in shared.matrices)


def test_team_runs_take_the_costs_they_are_given() -> None:
    """With free slices a team is as large as it may be; with slices as dear as the whole there is none."""
    matrix = Matrix(0, 10, 6, 4, cost=100.0)
    assert team_runs([matrix], IDLE, lambda m, ranks: 100.0) == {matrix: [whole(matrix)]}
    cut = team_runs([matrix], IDLE, lambda m, ranks: 100.0 / ranks)[matrix]
    assert [(run.start, run.length, run.width) for run in cut] == [(10, 8, 0), (18, 8, 0), (26, 4, 0), (30, 4, 0)]
    wide = Matrix(0, 10, 4, 6, cost=100.0)
    cut = team_runs([wide], IDLE, lambda m, ranks: 100.0 / ranks)[wide]
    found = [(run.start, run.length, run.width, run.stride) for run in cut]
    assert found == [(10, 8, 2, 6), (12, 8, 2, 6), (14, 4, 1, 6), (15, 4, 1, 6)]
    assert {run.brick for run in cut} == {10}
    assert [run.cost for run in cut] == [25.0] * 4


@pytest.mark.parametrize(("brick", "apart"), [(0, True), (4, False)])
def test_slices_go_apart_even_to_busier_ranks(brick: int, apart: bool) -> None:
    """One rank has a costly matrix; the other takes what is left, but of one matrix's two slices only one."""
    slices = [Run(0, 0, 4, 10.0, brick=0), Run(0, 4, 4, 10.0, brick=brick)]
    (shards,) = place_owners([slices, [Run(1, 0, 9, 100.0)]], IDLE[:2], 10**6)
    found = sorted([piece.param for piece in shard] for shard in shards.pieces)
    assert found == ([[0], [0, 1]] if apart else [[0, 0], [1]])


@pytest.mark.parametrize("transport", ["scatter", "owner"])
def test_ranks_that_are_busy_elsewhere_get_less(transport: Any) -> None:
    """What expert matrices cost a rank counts when the others are dealt out."""
    model = specs([((8, 8), "muon"), ((8, 8), "muon"), ((1000,), "adamw")])
    one = float(products(8, 8, [1] * 5))
    found = [
        flops_by_rank(make_plan(model, 2, "balanced", 10**6, transport, PLAIN, loads=b)) for b in ((), [3 * one, 0.0])
    ]
    assert found == [[one, one], [0.0, 2 * one]]


def test_elementwise_parameters_level_what_each_rank_holds() -> None:
    """One rank has the only matrix; the others get the table until all hold equally much."""
    shapes: list[tuple[tuple[int, ...], Kind]] = [((30_000,), "adamw"), ((100, 60), "muon")]
    plan = make_plan(specs(shapes), 4, "balanced", 10**6, "owner")
    assert [plan.shard_numel(rank) for rank in range(4)] == [9_000] * 4
    # The first table goes to all, the second to one rank, and the third makes up for both.
    tables: list[tuple[tuple[int, ...], Kind]] = [((7_001,), "adamw"), ((3_000,), "adamw"), ((20_000,), "adamw")]
    plan = make_plan(specs([*tables, *shapes[1:]]), 4, "balanced", 10, "owner")
    held_by = [plan.shard_numel(rank) for rank in range(4)]
    assert max(held_by) - min(held_by) <= 4
    small = place_owners([[Run(0, 0, 3, 0)], [Run(1, 0, 5, 0)], [Run(2, 0, 4, 9.0, brick=0)]], IDLE[:3], 1)
    assert [shards.lengths.count(0) for shards in small] == [2, 2, 2]
    assert sorted(sum(shards.lengths[rank] for shards in small) for rank in range(3)) == [3, 4, 5]


def test_team_bytes_by_hand() -> None:
    """Each of 5 rounds: a holder of 3 sends the others' parts of the 6 x 6 square, and its own sum to both of them."""
    plan = make_plan([ParamSpec("w", (6, 48), "muon")], 3, "team", 1, ns=PLAIN)
    ((_, matrix),) = teams(plan)
    assert matrix.holders == (0, 1, 2)
    # And the ranks agree on the largest element: an all-reduce of 4 bytes, 2 (d - 1) / d of them a rank.
    assert [plan.team_bytes(rank, 2) for rank in range(3)] == [5 * 2 * (24 + 24) + 2 * 4 * 2 // 3] * 3
    uneven = make_plan([ParamSpec("w", (5, 40), "muon")], 3, "team", 1, ns=PLAIN)
    assert [uneven.team_bytes(rank, 4) for rank in range(3)] == [5 * 4 * (25 - n + 2 * n) + 5 for n in (9, 8, 8)]
    assert [make_plan([ParamSpec("w", (6, 48), "muon")], 3, "balanced", 1).team_bytes(r, 2) for r in range(3)] == [
        0
    ] * 3
