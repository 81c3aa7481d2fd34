"""Equal shards: every element has one place, shards are level, and matrices stay whole where they can."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmuon import planner
from distmuon.bricks import Kind, ParamSpec, split_matrices
from distmuon.plan import BucketPlan, Plan, overlap

BUCKET_25_MB = 25_000_000 // 4
HYPOTHESIS = settings(derandomize=True, database=None, deadline=None, max_examples=150)

small = st.integers(0, 6)
elementwise = st.tuples(st.lists(st.integers(0, 9), max_size=2).map(tuple), st.just("adamw"))
matrix = st.tuples(st.one_of(st.tuples(small, small), st.tuples(small, small, small)), st.just("muon"))
models = st.lists(st.one_of(elementwise, matrix), max_size=9)
Shapes = list[tuple[tuple[int, ...], Kind]]
worlds, buckets, policies = st.integers(1, 8), st.integers(1, 250), st.sampled_from(["balanced", "flat"])


def specs(shapes: list[tuple[Any, Any]]) -> list[ParamSpec]:
    return [ParamSpec(f"p{i}", tuple(shape), kind) for i, (shape, kind) in enumerate(shapes)]


def make_plan(params: list[ParamSpec], world: int, policy: Any, bucket: int) -> Plan:
    return planner.make_plan(params, world, policy, bucket, "scatter")


def size(bucket: BucketPlan) -> int:
    return sum(piece.length for rank in bucket.pieces for piece in rank)


@HYPOTHESIS
@given(models, worlds, policies, buckets)
def test_every_element_is_placed_exactly_once(shapes: Any, world: int, policy: Any, bucket: int) -> None:
    plan = make_plan(specs(shapes), world, policy, bucket)
    pieces = [piece for b in plan.buckets for rank in b.pieces for piece in rank]
    assert all(piece.length > 0 for piece in pieces)
    for index, spec in enumerate(plan.params):
        mine = sorted((piece.start, piece.end) for piece in pieces if piece.param == index)
        assert [start for start, _ in mine] == [0, *(end for _, end in mine)][: len(mine)]
        assert (mine[-1][1] if mine else 0) == spec.numel


@HYPOTHESIS
@given(models, worlds, policies, buckets)
def test_shards_are_level_and_padding_is_less_than_an_element_a_rank(
    shapes: Any, world: int, policy: Any, bucket: int
) -> None:
    plan = make_plan(specs(shapes), world, policy, bucket)
    for b in plan.buckets:
        assert len(b.pieces) == world
        assert b.even
        assert 0 <= b.numel - size(b) < world
        for shard in b.pieces:
            ends = [piece.offset + piece.length for piece in shard]
            assert [piece.offset for piece in shard] == [0, *ends[:-1]][: len(shard)]
            assert ends[-1:] <= [b.lengths[0]]
    assert plan.padding == sum(b.numel - size(b) for b in plan.buckets)


@HYPOTHESIS
@given(models, worlds, policies, buckets)
def test_holders_are_the_ranks_with_a_part_of_the_matrix(shapes: Any, world: int, policy: Any, bucket: int) -> None:
    plan = make_plan(specs(shapes), world, policy, bucket)
    expected = [m for i, spec in enumerate(plan.params) for m in split_matrices(i, spec)]
    assert sorted((m.param, m.start) for m in plan.matrices) == [(m.param, m.start) for m in expected]
    for b in plan.buckets:
        for m in b.matrices:
            held = {r: sum(overlap(piece, m)[1] for piece in shard) for r, shard in enumerate(b.pieces)}
            assert m.holders == tuple(rank for rank, length in held.items() if length)
            assert sum(held.values()) == m.numel
            assert m.cut == (len(m.holders) > 1)


@HYPOTHESIS
@given(models, worlds, policies, buckets)
def test_buckets_close_when_full_and_follow_backward(shapes: Any, world: int, policy: Any, bucket: int) -> None:
    plan = make_plan(specs(shapes), world, policy, bucket)
    members = [index for b in plan.buckets for index in reversed(b.params)]
    assert members == [i for i in reversed(range(len(plan.params))) if plan.params[i].numel]
    for b in plan.buckets[:-1]:
        assert size(b) >= bucket
    if policy == "flat":
        for b in plan.buckets:
            assert size(b) - plan.params[b.params[0]].numel < bucket


@HYPOTHESIS
@given(models, worlds, buckets)
def test_flat_shards_are_runs_of_the_concatenated_parameters(shapes: Any, world: int, bucket: int) -> None:
    for b in make_plan(specs(shapes), world, "flat", bucket).buckets:
        elements = [(p.param, p.start + i) for shard in b.pieces for p in shard for i in range(p.length)]
        assert elements == sorted(elements, key=lambda element: (-element[0], element[1]))
        full, rest = divmod(len(elements), b.lengths[0])
        held = [sum(piece.length for piece in shard) for shard in b.pieces]
        assert held == ([b.lengths[0]] * full + [rest] + [0] * world)[:world]


@HYPOTHESIS
@given(models, worlds, buckets)
def test_balanced_merges_everything_before_it_cuts(shapes: Any, world: int, bucket: int) -> None:
    plan = make_plan(specs(shapes), world, "balanced", bucket)
    if any(m.cut for m in plan.matrices):
        assert len(plan.buckets) == 1


@HYPOTHESIS
@given(models, worlds, buckets)
def test_balanced_keeps_every_matrix_whole_with_enough_elementwise_parameters(
    shapes: Any, world: int, bucket: int
) -> None:
    """A rank has room for a matrix of n elements as long as the other elements fill the gaps of the others."""
    largest = max((m.numel for i, s in enumerate(specs(shapes)) for m in split_matrices(i, s)), default=0)
    filler = ((world * largest + 1,), "adamw")
    for filled in ([*shapes, filler], [filler, *shapes]):
        assert not any(m.cut for m in make_plan(specs(filled), world, "balanced", bucket).matrices)


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(1, 3), (1, 3), (1, 2), (1, 2), (1, 2)], id="3+3=2+2+2"),
        pytest.param([(1, 8), (2, 2), (2, 2), (2, 2), (2, 2)], id="long-but-cheap"),
    ],
)
def test_balanced_finds_equal_shards_of_whole_matrices(shapes: list[tuple[int, int]]) -> None:
    """Two equal shards can be had here without a cut and without any elementwise parameter."""
    plan = make_plan(specs([(shape, "muon") for shape in shapes]), 2, "balanced", 10**6)
    assert not any(m.cut for m in plan.matrices)


def test_a_bucket_that_cannot_be_levelled_takes_further_parameters() -> None:
    model = specs([((16,), "adamw"), ((4, 4), "muon"), ((40,), "adamw")])
    plan = make_plan(model, 2, "balanced", 1)
    assert [bucket.params for bucket in plan.buckets] == [(2,), (0, 1)]
    assert not any(m.cut for m in plan.matrices)
    assert [b.params for b in make_plan(model, 2, "flat", 1).buckets] == [(2,), (1,), (0,)]


def test_a_last_bucket_that_cannot_be_levelled_joins_the_one_before() -> None:
    plan = make_plan(specs([((4, 4), "muon"), ((40,), "adamw"), ((6,), "adamw")]), 2, "balanced", 1)
    assert [bucket.params for bucket in plan.buckets] == [(2,), (0, 1)]
    assert not any(m.cut for m in plan.matrices)


def test_merging_takes_the_loads_of_the_merged_bucket_back() -> None:
    """The square one is in a bucket that is closed first and merged later; its cost must count once."""
    model = specs([*[((8, 16), "muon")] * 5, ((16, 16), "muon"), ((384,), "adamw")])
    plan = make_plan(model, 2, "balanced", 640)
    assert len(plan.buckets) == 1
    whole = {(m.rows, m.cols): m.cost for m in plan.matrices}
    least, square = whole[8, 16], whole[16, 16]
    assert {plan.newton_schulz_flops(rank) for rank in (0, 1)} == {5 * least, square}


def test_a_matrix_that_nothing_levels_is_cut() -> None:
    plan = make_plan(specs([((4, 4), "muon"), ((15,), "adamw")]), 2, "balanced", 1)
    assert [bucket.params for bucket in plan.buckets] == [(0, 1)]
    assert [(m.holders, m.cut) for m in plan.matrices] == [((0,), False)]
    plan = make_plan(specs([((4, 4), "muon"), ((13,), "adamw")]), 2, "balanced", 1)
    assert [bucket.params for bucket in plan.buckets] == [(0, 1)]
    assert [m.holders for m in plan.matrices] == [(0, 1)]


def test_loads_are_carried_over_buckets() -> None:
    """Each bucket has one matrix; without the memory of the first, both would go to the same rank."""
    half = [((16,), "adamw"), ((4, 4), "muon")]
    plan = make_plan(specs(half * 4), 2, "balanced", 32)
    assert len(plan.buckets) == 4
    assert sorted(m.holders for m in plan.matrices) == [(0,), (0,), (1,), (1,)]


def test_costs_not_sizes_are_balanced() -> None:
    """Of equal size, one square matrix costs as much as several flat ones; the flat ones share a rank."""
    model = specs([((4000,), "adamw"), ((16, 16), "muon"), *[((2, 128), "muon")] * 4])
    plan = make_plan(model, 2, "balanced", 10**6)
    (square,) = [m for m in plan.matrices if m.rows == 16]
    flat = [m for m in plan.matrices if m.rows == 2]
    assert {m.holders for m in flat}.isdisjoint({square.holders})


@pytest.mark.parametrize("policy", ["balanced", "flat"])
def test_nothing_to_place(policy: Any) -> None:
    assert make_plan([], 3, policy, 10).buckets == ()
    assert make_plan(specs([((0,), "adamw"), ((0, 4), "muon")]), 3, policy, 10).buckets == ()


@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 4)])
def test_one_parameter_over_more_ranks_than_elements_or_not(policy: Any, shape: tuple[int, ...]) -> None:
    for world in range(1, 9):
        plan = make_plan([ParamSpec("w", shape, "muon")], world, policy, 10**6)
        (bucket,) = plan.buckets
        assert set(bucket.lengths) == {-(-plan.numel // world)}
        assert len(plan.matrices) == (shape[0] if len(shape) == 3 else 1)


def moe_mini() -> list[ParamSpec]:
    """Shapes of configs/models/moe_mini.toml with a vocabulary of 4,096."""
    attention: Shapes = [((128,), "adamw"), ((128, 128), "muon"), ((64, 128), "muon"), ((64, 128), "muon")]
    router: Shapes = [((128, 128), "muon"), ((128,), "adamw"), ((8, 128), "muon")]
    expert: Shapes = [((256, 128), "muon"), ((256, 128), "muon"), ((128, 256), "muon")]
    return specs([((4096, 128), "adamw"), *[*attention, *router, *expert * 8] * 4, ((128,), "adamw")])


def llama(layers: int = 16, width: int = 2048, hidden: int = 8192) -> list[ParamSpec]:
    block: Shapes = [((width,), "adamw"), ((width, width), "muon"), ((width // 4, width), "muon")]
    block += [((width // 4, width), "muon"), ((width, width), "muon"), ((width,), "adamw")]
    block += [((hidden, width), "muon"), ((hidden, width), "muon"), ((width, hidden), "muon")]
    return specs([((32_000, width), "adamw"), *block * layers, ((width,), "adamw"), ((32_000, width), "adamw")])


def spread(plan: Plan) -> float:
    """Largest over mean Newton-Schulz cost."""
    costs = [plan.newton_schulz_flops(rank) for rank in range(plan.world)]
    return max(costs) * plan.world / sum(costs)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_mini_moe_is_level_and_uncut(world: int) -> None:
    plan = make_plan(moe_mini(), world, "balanced", BUCKET_25_MB)
    assert not any(m.cut for m in plan.matrices)
    assert spread(plan) <= 1.05
    assert spread(plan) < spread(make_plan(moe_mini(), world, "flat", BUCKET_25_MB))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_llama_is_level_and_uncut(world: int) -> None:
    plan = make_plan(llama(), world, "balanced", BUCKET_25_MB)
    assert not any(m.cut for m in plan.matrices)
    assert spread(plan) <= 1.15
