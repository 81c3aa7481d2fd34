"""Predicted steps against hand-computed seconds, and what must never get faster."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from distmuon.bricks import Matrix, ParamSpec
from distmuon.config import parse
from distmuon.errors import ConfigError
from distmuon.machine import Machine, Workload
from distmuon.placement import Piece
from distmuon.plan import BucketPlan, Plan
from distmuon.planner import make_plan
from distmuon.predict import Placed, predict
from distmuon.simulate import most_in_flight

MACHINES = Path(__file__).resolve().parents[2] / "configs" / "machines"
# 1 byte a second and 1 FLOP a second everywhere, and no latency: every figure below is a count.
UNIT = Machine(
    name="unit",
    peak_flops=1,
    model_efficiency=1,
    newton_schulz_efficiency=1,
    memory_bandwidth=32,
    memory_efficiency=1,
    ranks_per_node=1,
    intra_bandwidth=1,
    inter_bandwidth=1,
    link_efficiency=1,
    intra_latency=0,
    inter_latency=0,
    call_overhead=0,
)
MODEL = [
    ParamSpec("table", (64, 16), "adamw"),
    *(ParamSpec(f"{i}.{name}", shape, "muon") for i in range(4) for name, shape in (("a", (16, 16)), ("b", (48, 16)))),
    ParamSpec("gain", (16,), "adamw"),
]


def bucket(params: list[tuple[int, int, int]], lengths: tuple[int, ...], work: float = 0.0) -> BucketPlan:
    """Pieces (rank, parameter, elements), each a matrix of its own if it costs work."""
    pieces: list[tuple[Piece, ...]] = [() for _ in lengths]
    matrices = []
    for rank, param, length in params:
        pieces[rank] += (Piece(param, 0, length, sum(piece.length for piece in pieces[rank])),)
        if work:
            matrices.append(Matrix(param, 0, 1, length, work, (rank,), (), (work,)))
    return BucketPlan(lengths, tuple(pieces), tuple(matrices))


def plan(buckets: list[BucketPlan], sizes: list[int], transport: Any = "scatter", kind: Any = "muon") -> Plan:
    specs = tuple(ParamSpec(f"p{i}", (1, size), kind) for i, size in enumerate(sizes))
    return Plan("balanced", transport, len(buckets[0].lengths), 1, specs, tuple(buckets))


class TestStep:
    # Forward takes 2 s a parameter of 1 element, backward 4: gradients arrive 4 s apart.
    WORK = Workload(tokens_per_rank=1, wave_numel=0)

    def test_reductions_hide_behind_backward_but_for_the_last(self) -> None:
        buckets = [bucket([(0, 1, 1)], (1, 1)), bucket([(0, 0, 1)], (1, 1))]
        made = plan(buckets, [1, 1])
        found = predict([Placed(made)], UNIT, self.WORK)
        assert (found.forward, found.backward) == (4, 8)
        # A bucket of 2 elements of 4 bytes, 2 ranks: 4 s. The first is sent from 4 to 8, the second from 8 to 12.
        assert (found.reduce, found.exposed_reduce) == (8, 4)

    def test_the_link_takes_one_bucket_at_a_time(self) -> None:
        buckets = [bucket([(0, 1, 1)], (5, 5)), bucket([(0, 0, 1)], (1, 1))]
        # The first is sent from 4 to 24, the second waits for it and ends at 28; backward ends at 8.
        assert predict([Placed(plan(buckets, [1, 1]))], UNIT, self.WORK).exposed_reduce == 20

    def test_given_flops_say_when_gradients_arrive(self) -> None:
        buckets = [bucket([(0, 1, 1)], (1, 1)), bucket([(0, 0, 1)], (1, 1))]
        work = Workload(tokens_per_rank=1, flops={"p0": 100.0, "p1": 1.0, "no parameter": 1.0})
        found = predict([Placed(plan(buckets, [1, 1]))], UNIT, work)
        assert (found.forward, found.backward) == (102, 204)
        assert found.exposed_reduce == 4

    def test_owners_are_bound_by_the_rank_that_owns_least(self) -> None:
        # 10 elements of 4 bytes, all on one rank: the other sends them all.
        made = plan([bucket([(0, 0, 1)], (10, 0))], [1], "owner")
        assert predict([Placed(made)], UNIT, self.WORK).reduce == 40

    def test_owners_without_rings_receive_from_everybody(self) -> None:
        direct = UNIT.model_copy(update={"reduce_scatter": "all_to_all"})
        made = plan([bucket([(0, 0, 1)], (10, 0, 0))], [1], "owner")
        assert predict([Placed(made)], direct, self.WORK).reduce == 2 * 40
        even = plan([bucket([(0, 0, 1)], (4, 4, 4))], [1])
        assert predict([Placed(even)], direct, self.WORK).reduce == 2 / 3 * 48

    def test_newton_schulz_counts_for_the_busiest_rank_and_gathers_follow_it(self) -> None:
        first = bucket([(0, 4, 1), (0, 5, 1), (1, 6, 1), (1, 7, 1)], (2, 2), 5.0)
        second = bucket([(0, 0, 1), (0, 1, 1), (1, 2, 1), (1, 3, 1)], (2, 2), 3.5)
        found = predict([Placed(plan([first, second], [1] * 8))], UNIT, self.WORK)
        assert found.newton_schulz == 17
        # Elementwise: 28 + 4 bytes of 4 elements at 32 B/s.
        assert found.update == 4
        # The first bucket is gathered while the second is computed; the last one's 8 s are left.
        assert (found.gather, found.exposed_gather) == (16, 8)
        assert found.guard == pytest.approx(2 * 16 / 2)
        assert found.optimizer == found.exposed_reduce + 16 + 17 + 4 + 8
        assert found.step == found.forward + found.backward + found.optimizer

    def test_owners_compute_at_once_whatever_may_be_in_flight(self) -> None:
        # One matrix a bucket, each on another rank: 9 s of Newton-Schulz, then updates of 100 s and gathers of 800.
        buckets = [bucket([(rank, 2 - rank, 1)], (100, 100, 100), 9.0) for rank in range(3)]
        made = plan(buckets, [1, 1, 1])
        free = predict([Placed(made)], UNIT, self.WORK)
        few = predict([Placed(made)], UNIT, Workload(tokens_per_rank=1, wave_numel=0, in_flight_bytes=0))
        assert few.newton_schulz == free.newton_schulz == 9
        assert few.exposed_gather == free.exposed_gather == pytest.approx(9 + 100 + 3 * 800 - 309)
        assert few.peak_buffer_bytes <= free.peak_buffer_bytes

    def test_few_bytes_in_flight_keep_the_next_wave_waiting(self) -> None:
        buckets = [bucket([(0, 2 * i, 1), (1, 2 * i + 1, 1)], (100, 100), 9.0) for i in range(6)][::-1]
        made = plan(buckets, [1] * 12)
        waits = [
            predict(
                [Placed(made)], UNIT, Workload(tokens_per_rank=1, wave_numel=0, in_flight_bytes=limit)
            ).exposed_gather
            for limit in (800, 10**9)
        ]
        assert waits[0] == waits[1]
        slow = UNIT.model_copy(update={"newton_schulz_efficiency": 1e-3})
        waits = [
            predict(
                [Placed(made)], slow, Workload(tokens_per_rank=1, wave_numel=0, in_flight_bytes=limit)
            ).exposed_gather
            for limit in (800, 10**9)
        ]
        assert waits[0] > waits[1]

    def test_the_next_forward_hides_gathers(self) -> None:
        # 16 s of gathers behind a forward that needs the parameters of its end last, but gets them first.
        buckets = [bucket([(0, 1, 1)], (1, 1)), bucket([(0, 0, 1)], (3, 3))]
        made = plan(buckets, [1, 1])
        late = Workload(tokens_per_rank=1, overlap_forward=True, flops={"free": 10.0, "p0": 1.0, "p1": 1.0})
        now = Workload(tokens_per_rank=1, flops=late.flops)
        waited = predict([Placed(made)], UNIT, late)
        assert predict([Placed(made)], UNIT, now).exposed_gather == 13
        # p0 is gathered first: from 3 to 15, p1 from 15 to 19. What comes before p0 ends at 14, p0 at 16, p1 at 20.
        assert waited.exposed_gather == 20 - 12 - 4

    def test_cut_matrices_are_completed_and_sent(self) -> None:
        cut = Matrix(0, 0, 1, 8, 5.0, (0, 1), (), (5.0, 5.0))
        pieces = ((Piece(0, 0, 4, 0),), (Piece(0, 4, 4, 0),))
        made = plan([BucketPlan((4, 4), pieces, (cut,))], [8])
        found = predict([Placed(made)], UNIT, self.WORK)
        # Each rank lacks 4 elements of 2 bytes.
        assert (found.complete, found.newton_schulz) == (8, 5)
        # Reduce and gather 16 bytes each, pieces 8.
        assert (found.inter_node_bytes, found.intra_node_bytes) == (40, 0)

    def test_a_rank_between_two_cut_matrices_receives_parts_of_both(self) -> None:
        cut = [Matrix(i, 0, 1, 8, 5.0, (i, i + 1), (), (5.0, 5.0)) for i in range(2)]
        pieces = ((Piece(0, 0, 4, 0),), (Piece(0, 4, 4, 0), Piece(1, 0, 4, 4)), (Piece(1, 4, 4, 0),))
        made = plan([BucketPlan((8, 8, 8), pieces, tuple(cut))], [8, 8])
        assert predict([Placed(made)], UNIT, self.WORK).complete == 2 * 8

    def test_larger_teams_send_more(self) -> None:
        team = Matrix(0, 0, 3, 9, 5.0, (0, 1, 2), (3, 3, 3), (2.0, 2.0, 2.0), 2)
        pieces = tuple((Piece(0, 3 * i, 9, 0, 3, 9),) for i in range(3))
        made = plan([BucketPlan((9, 9, 9), pieces, (team,))], [27], "owner")
        # Two rounds of two exchanges of two thirds of 18 bytes; an all-reduce of 4 bytes over 3 ranks.
        assert predict([Placed(made)], UNIT, self.WORK).complete == pytest.approx(2 * 2 * 12 + 2 * 4 * 2 / 3)

    def test_teams_sum_gram_matrices(self) -> None:
        team = Matrix(0, 0, 3, 8, 5.0, (0, 1), (4, 4), (2.0, 3.0), 2)
        pieces = ((Piece(0, 0, 12, 0, 4, 8),), (Piece(0, 4, 12, 0, 4, 8),))
        made = plan([BucketPlan((12, 12), pieces, (team,))], [24], "owner")
        found = predict([Placed(made)], UNIT, self.WORK)
        # Two rounds of two exchanges of half of 3 x 3 elements of 2 bytes; before, an all-reduce of 4 bytes.
        assert (found.complete, found.newton_schulz) == (2 * 2 * 9 + 4, 3)
        # The slower slice, the exchanges, 12 elementwise seconds, then 48 s of gather; all but the last is computing.
        assert found.exposed_gather == 48

    def test_expert_groups_are_spread_over_nodes(self) -> None:
        machine = UNIT.model_copy(update={"ranks_per_node": 4, "intra_bandwidth": 100.0})
        made = plan([bucket([(0, 0, 1)], (50, 50))], [1])
        # Two neighbours share a node; two ranks at a distance of 4 do not.
        assert predict([Placed(made, 1)], machine, self.WORK).reduce == 2
        assert predict([Placed(made, 4)], machine, self.WORK).reduce == 200

    def test_buffers_in_flight(self) -> None:
        assert most_in_flight([0, 1, 5], [2, 6, 7], [10, 20, 30]) == 50
        assert most_in_flight([0, 0], [0, 0], [10, 20]) == 20
        made = plan([bucket([(0, 1, 1)], (5, 5)), bucket([(0, 0, 1)], (1, 1))], [1, 1])
        # While the first bucket of 10 elements is sent, the second of 2 waits; a rank keeps 6 reduced ones.
        assert predict([Placed(made)], UNIT, self.WORK).peak_buffer_bytes == 4 * (10 + 2) + 4 * 6

    def test_one_rank_sends_nothing(self) -> None:
        found = predict([Placed(make_plan(MODEL, 1))], UNIT, self.WORK)
        assert found.exposed_reduce == found.exposed_gather == found.guard == found.complete == 0
        assert found.inter_node_bytes == found.intra_node_bytes == 0


@pytest.mark.parametrize("policy", ["balanced", "flat", "team"])
@pytest.mark.parametrize("world", [2, 8, 32])
@pytest.mark.parametrize(
    "change",
    [
        {"intra_bandwidth": 1e9},
        {"inter_bandwidth": 1e8},
        {"inter_latency": 1e-3},
        {"call_overhead": 1e-3},
        {"peak_flops": 1e12},
        {"memory_bandwidth": 1e10},
    ],
)
def test_a_slower_machine_is_never_faster(policy: Any, world: int, change: dict[str, float]) -> None:
    placed = [Placed(make_plan(MODEL, world, policy, 1000))]
    slower = Machine().model_copy(update=change)
    assert predict(placed, slower, Workload()).step >= predict(placed, Machine(), Workload()).step


def test_the_traffic_is_what_the_plan_says() -> None:
    made = make_plan(MODEL, 16, "flat", 1000)
    found = predict([Placed(made)], Machine(), Workload(param_itemsize=2))
    pieces = sum(made.completion_bytes(rank, 2) for rank in range(16)) / 16
    assert found.inter_node_bytes + found.intra_node_bytes == pytest.approx(
        made.shard_bytes(4) + made.shard_bytes(2) + pieces, abs=2
    )


@pytest.mark.parametrize("name", [path.stem for path in sorted(MACHINES.glob("*.toml"))])
def test_machine_files_are_complete(name: str) -> None:
    table = tomllib.loads((MACHINES / f"{name}.toml").read_text())
    assert set(table) == set(Machine.model_fields)
    machine = parse(Machine, table, name)
    assert (machine == Machine()) is (name == "h100_ib")


def test_links_get_the_part_of_the_bandwidth_that_collectives_reach() -> None:
    machine = UNIT.model_copy(
        update={"link_efficiency": 0.5, "intra_bandwidth": 8, "inter_bandwidth": 2, "ranks_per_node": 8}
    )
    assert (machine.link().bandwidth, machine.link().inter_bandwidth, machine.link().ranks_per_node) == (4, 1, 8)
    assert (machine.link(2).ranks_per_node, machine.link(16).ranks_per_node) == (4, 1)


def test_impossible_machines_are_named() -> None:
    with pytest.raises(ConfigError, match='"link_efficiency" = 1.5'):
        parse(Machine, {"link_efficiency": 1.5}, "m.toml")
