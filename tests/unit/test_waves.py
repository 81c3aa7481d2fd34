"""Which buckets are orthogonalized together."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distmuon import pipeline
from distmuon.bricks import ParamSpec
from distmuon.comm import Group, Traffic
from distmuon.exchange import Exchange
from distmuon.planner import make_plan
from distmuon.waves import make_waves
from tests.ranks import run_threads


def matrices(count: int, side: int) -> list[ParamSpec]:
    return [ParamSpec(f"{side}.{number}", (side, side), "muon") for number in range(count)]


def grouped(specs: list[ParamSpec], world: int, least: int, transport: str = "owner") -> list[list[int]]:
    made = make_plan(specs, world, "balanced", 1, transport)  # type: ignore[arg-type]
    return list(make_waves(made.buckets, least))


def test_a_wave_ends_when_it_has_elements_enough() -> None:
    assert grouped(matrices(6, 4), 1, 48) == [[0, 1, 2], [3, 4, 5]]
    assert grouped(matrices(7, 4), 1, 48) == [[0, 1, 2], [3, 4, 5], [6]]
    assert grouped(matrices(6, 4), 1, 10**9) == [list(range(6))]


def test_a_wave_has_two_of_the_largest_matrices_for_every_rank() -> None:
    assert [len(wave) for wave in grouped(matrices(20, 4), 2, 1)] == [4] * 5
    assert [len(wave) for wave in grouped(matrices(20, 4), 5, 1)] == [11, 9]
    # One matrix of 64 elements among those of 16: eight of these weigh two of it, on every rank.
    assert [len(wave) for wave in grouped([*matrices(1, 8), *matrices(16, 4)], 1, 1)] == [8, 8, 1]


def test_elementwise_buckets_join_the_wave_of_the_next_matrices() -> None:
    specs = [*matrices(2, 4), ParamSpec("gain", (9,), "adamw"), *matrices(2, 4)]
    assert grouped(specs, 1, 1) == [[0, 1], [2, 3, 4]]
    assert grouped([ParamSpec("gain", (9,), "adamw")], 1, 1) == [[0]]


def test_nothing() -> None:
    assert list(make_waves([], 1)) == []


def test_ranks_with_experts_of_different_shapes_take_one_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would issue the collectives that they share in different orders."""

    def agreed(rank: int, world: int, same: bool) -> list[list[int]]:
        plan = make_plan(matrices(6, 4 if same or rank == 0 else 8), 1, "balanced", 1, "owner")
        reductions: list[Any] = [
            SimpleNamespace(bucket=SimpleNamespace(plan=bucket, device=torch.device("cpu"))) for bucket in plan.buckets
        ]
        return pipeline.agree_on_waves(Group(None, Traffic()), reductions)

    monkeypatch.setattr(pipeline, "CPU_NUMEL", 40)
    assert run_threads(1, agreed, True) == [[[0, 1, 2], [3, 4, 5]]]
    assert run_threads(2, agreed, False) == [[list(range(6))]] * 2


def test_an_exchange_ends_before_the_interpreter_and_passes_errors_on() -> None:
    gate = threading.Event()
    under_way = Exchange([SimpleNamespace(wait=gate.wait)])
    assert not under_way.is_completed()
    # The interpreter joins threads that are no daemons: what others wait for is sent before this rank is gone.
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "distmuon-exchange"] == [False]
    gate.set()
    under_way.wait()
    assert under_way.is_completed()

    def fail() -> None:
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        Exchange([SimpleNamespace(wait=fail)]).wait()
