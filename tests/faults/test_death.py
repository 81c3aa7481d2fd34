"""A rank is killed in a step: every other rank raises at once, and says where and who."""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from distmuon.dist_muon import DistMuon
from distmuon.errors import CollectiveError
from tests.distributed.scenario import SMALL_MB, Case, backward, gradients, groups, optimizer, parameters
from tests.faults.launch import die, run_ranks, strike
from tests.faults.lost import POINTS, STEPS, check, lose

WITHIN = 2.0
POLICIES = ("balanced", "flat", "team")


def kill(world: int, point: str, seed: int) -> float:
    """Kill a rank drawn by lot; seconds from its death to the last error."""
    draw = random.Random(f"{world} {point} {seed}")
    rank, step, policy = draw.randrange(world), draw.randrange(STEPS), draw.choice(POLICIES)
    # What keeps matrices whole has one bucket at four ranks.
    call = draw.randrange(1, 3) if point in ("before reduce", "in gather") and policy == "flat" else 1
    at, endings = lose(world, action="die", point=point, rank=rank, step=step, call=call, policy=policy)
    check(endings, rank, step, point)
    assert endings[rank].exit_code == -9
    others = [ending for other, ending in enumerate(endings) if other != rank]
    # On a busy machine a rank may speak too late for another.
    assert [] in [ending.verdict["silent"] for ending in others]
    for ending in others:
        assert ending.verdict["gone"] == [rank], ending.verdict
        assert f"rank {rank} is gone" in ending.verdict["text"]
        assert ending.ended - at < WITHIN + 2.0, "a rank that raised ends"
    return max(float(ending.verdict["at"]) - at for ending in others)


def kill_all(cases: Sequence[tuple[int, str, int]], figure: Callable[[str], None]) -> None:
    seconds = [kill(*case) for case in cases]
    worst = max(seconds)
    figure(
        f"{len(seconds)} kills: every survivor raised, naming step, phase and the dead rank, "
        f"{sorted(seconds)[len(seconds) // 2]:.2f} s (median) and at most {worst:.2f} s after the death; 0 hangs"
    )
    assert worst <= WITHIN


@pytest.mark.fault("F1")
@pytest.mark.parametrize("world", [2, 4])
def test_survivors_of_a_kill_raise(world: int, figure: Callable[[str], None]) -> None:
    kill_all([(world, point, 0) for point in POINTS], figure)


@pytest.mark.soak
@pytest.mark.fault("F1")
@pytest.mark.timeout(600)
def test_survivors_of_forty_kills_raise(figure: Callable[[str], None]) -> None:
    kill_all(list(itertools.product((2, 4), POINTS, range(5))), figure)


@pytest.mark.fault("F1")
def test_the_store_dies_with_its_host(figure: Callable[[str], None]) -> None:
    """Without torchrun rank 0 has the store: then nobody can say who is alive, but everybody still raises."""
    how: dict[str, Any] = {"action": "die", "point": "in gather", "rank": 0, "step": 1, "policy": "flat"}
    at, endings = lose(4, **how, port=free_port())
    check(endings, 0, 1, "in gather")
    assert all(0 in ending.verdict["gone"] for ending in endings[1:])
    worst = max(float(ending.verdict["at"]) - at for ending in endings[1:])
    figure(f"the rank with the store killed: every survivor raised within {worst:.2f} s")
    assert worst <= WITHIN


@pytest.mark.fault("F1")
def test_the_word_goes_round_though_nobody_leaves(figure: Callable[[str], None]) -> None:
    """In a ring most ranks wait for the living, which go on living: they must be woken."""
    how: dict[str, Any] = {"action": "die", "point": "after reduce", "rank": 1, "step": 1, "policy": "flat"}
    at, endings = lose(4, **how, linger=3.0)
    worst = max(float(endings[rank].verdict["at"]) - at for rank in (0, 2, 3))
    figure(f"3 survivors of 4 that stay alive: each raised within {worst:.2f} s of the death")
    assert worst <= WITHIN


def die_in_backward(rank: int, world: int, group: Any) -> list[str]:
    """Rank 1 dies at its first reduction; rank 0 launches its second when that is known: where the error comes out."""
    case = Case(policy="flat")
    params = parameters()
    opt = optimizer(params, case)
    action = die if rank else lambda: time.sleep(0.5)
    with strike("distmuon.comm.Group.reduce_scatter", action, call=1 if rank else 2):
        try:
            backward(params, gradients(case, 0, 0, rank, world))
        except CollectiveError as error:
            return ["backward", str(error)]
    opt.step()
    return ["nowhere"]


@pytest.mark.fault("F1")
def test_the_error_comes_out_of_backward(figure: Callable[[str], None]) -> None:
    where, text = run_ranks(2, die_in_backward)[0].verdict
    assert where == "backward"
    assert 'step 0, phase "reduce", bucket ' in text
    figure(f"a rank killed while the other was in backward: the error came out of {where}()")


def die_beside_a_busy_rank(rank: int, world: int, group: Any) -> dict[str, Any]:
    """Rank 1 dies before the vote while rank 2 computes for longer than the others listen."""
    actions = {1: die, 2: lambda: time.sleep(1.5)}
    case = Case(policy="flat")
    params = parameters()
    opt = optimizer(params, case)
    backward(params, gradients(case, 0, 0, rank, world))
    try:
        with strike("distmuon.comm.Group.all_reduce_sum", actions.get(rank, lambda: None)):
            opt.step()
    except CollectiveError as error:
        return {"gone": error.gone, "silent": error.silent, "at": time.monotonic()}
    return {}


@pytest.mark.fault("F1")
def test_a_busy_rank_is_not_called_dead(figure: Callable[[str], None]) -> None:
    endings = run_ranks(4, die_beside_a_busy_rank)
    said = [ending.verdict for ending in endings]
    assert [said[rank]["gone"] for rank in (0, 2, 3)] == [[1]] * 3
    # Rank 3 may wait for rank 2, which nobody can wake.
    assert 2 in said[0]["silent"]
    assert said[2]["silent"] == []
    busy = max(said[rank]["at"] - endings[1].ended for rank in (0, 2, 3)) - 1.5
    figure(f"1 of 4 killed, 1 busy: it was called silent, not gone, and all raised {busy:.2f} s after it was back")
    assert busy < WITHIN


def die_among_experts(rank: int, world: int, group: Any) -> dict[str, Any]:
    """Rank 3 dies before the experts of ranks 1 and 3 are reduced; ranks 0 and 2 have others and notice later."""
    pairs = [dist.new_group([first, first + 2], timeout=timedelta(seconds=20)) for first in (0, 1)]
    params = parameters()
    split = [{**given, "params": [p for p in given["params"] if p[0] != "experts"]} for given in groups(params)]
    experts = {"params": [("experts", params["experts"])], "kind": "muon", "expert_group": "pair"}
    opt = DistMuon([*split, experts], policy="flat", bucket_mb=SMALL_MB, expert_groups={"pair": pairs[rank % 2]})
    last = [reduction.group.size for reduction in opt.reductions].index(2) + 1
    try:
        with strike("distmuon.comm.Group.reduce_scatter", die if rank == 3 else lambda: None, call=last):
            backward(params, gradients(Case(), 0, 0, rank, world))
            opt.step()
    except CollectiveError as error:
        return {"gone": error.gone, "silent": error.silent, "at": time.monotonic()}
    return {}


@pytest.mark.fault("F1")
def test_a_death_among_experts_reaches_all(figure: Callable[[str], None]) -> None:
    endings = run_ranks(4, die_among_experts)
    said = [ending.verdict for ending in endings[:3]]
    assert [(facts["gone"], facts["silent"]) for facts in said] == [([3], [])] * 3
    worst = max(float(facts["at"]) - endings[3].ended for facts in said)
    figure(f"1 of 4 killed in a group of 2 experts: all 3 others raised within {worst:.2f} s")
    assert worst <= WITHIN


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
