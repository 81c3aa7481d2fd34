"""The prediction of step times, on numbers worked out by hand."""

from __future__ import annotations

import pytest

from distmuon.benchmarks.links_model import (
    PAYLOAD,
    Call,
    Compute,
    Listed,
    find_links,
    listed_seconds,
    planned_seconds,
    predict_all,
    wire_bytes,
    without_limit,
)
from distmuon.bricks import ParamSpec
from distmuon.plan import Plan
from distmuon.planner import make_plan
from distmuon.predict import Link

# 1000 bytes/s; over 4 ranks an all-gather of 4000 bytes takes 3 s, an all-reduce 6 s.
SLOW = Link(1000.0)
DEEPSPEED = Listed(early=(), late=(Call("all_reduce", 4000), Call("all_gather", 4000)))


def plan(world: int, bucket_numel: int = 10**9) -> Plan:
    matrices = [ParamSpec(f"m{index}", (8, 8), "muon") for index in range(4)]
    return make_plan(
        [*matrices, ParamSpec("gain", (64,), "adamw")], world, bucket_numel=bucket_numel, transport="scatter"
    )


def test_bytes() -> None:
    assert wire_bytes(DEEPSPEED, 4) == 2 * 3000 + 3000
    # 320 elements of 4 bytes, reduced and gathered.
    assert wire_bytes([plan(4)], 4) == 2 * 320 * 4 * 3 / 4
    assert wire_bytes([plan(1)], 1) == 0


def test_late_collectives_add_up() -> None:
    assert listed_seconds(Compute(2.0, 0.5, 0.25), DEEPSPEED, 4, SLOW) == pytest.approx(2.75 + 9.0)
    assert listed_seconds(Compute(2.0), DEEPSPEED, 1, SLOW) == 2.0


def test_latency_counts_per_hop() -> None:
    # 3 hops to gather, 6 to reduce and gather.
    assert listed_seconds(Compute(0.0), DEEPSPEED, 4, Link(1000.0, latency=0.1)) == pytest.approx(9.0 + 0.9)


@pytest.mark.parametrize(("model", "exposed"), [(3.0, 4.0), (9.0, 0.0), (30.0, 0.0)])
def test_early_collectives_hide_behind_backward(model: float, exposed: float) -> None:
    early = Listed(early=(Call("all_reduce", 4000),), late=(Call("all_gather", 4000),))
    # Two thirds of the model's time are backward.
    assert listed_seconds(Compute(model), early, 4, SLOW) == pytest.approx(model + exposed + 3.0)


def test_one_bucket_hides_nothing() -> None:
    # 1280 bytes: reduced after backward, gathered after the update.
    assert planned_seconds(Compute(2.0, 0.5, 0.25), [plan(4)], SLOW) == pytest.approx(
        2.75 + 2 * 0.96, rel=1e-3, abs=0.05
    )


def test_computing_is_what_was_measured() -> None:
    free = Link(1e15)
    assert planned_seconds(Compute(2.0, 0.5, 0.25), [plan(4)], free) == pytest.approx(2.75)
    assert planned_seconds(Compute(2.0), [plan(4)], free) == pytest.approx(2.0)


def test_buckets_overlap_with_backward() -> None:
    one, several = plan(4), plan(4, bucket_numel=64)
    assert [bucket.numel for bucket in several.buckets] == [64, 256]
    # The gain's 256 bytes are reduced while the matrices go backward.
    saved = planned_seconds(Compute(6.0), [one], SLOW) - planned_seconds(Compute(6.0), [several], SLOW)
    assert saved == pytest.approx(0.192)


def test_the_model_is_found_from_the_whole() -> None:
    assert without_limit(lambda model: 2 * model + 1, 5.0) == pytest.approx(2.0)
    assert without_limit(lambda model: model + 10, 5.0) == pytest.approx(0.0)


@pytest.mark.parametrize("sends", [DEEPSPEED, [plan(4)]])
def test_the_first_prediction_is_the_measurement(sends: Listed | list[Plan]) -> None:
    fast, slow = predict_all(12.0, (0.5, 0.25), sends, 4, [SLOW, Link(500.0)])
    assert fast == pytest.approx(12.0)
    assert slow == pytest.approx(12.0 + wire_bytes(sends, 4) / 1000, rel=1e-2)


def test_links() -> None:
    # gloo passes 3/4 + 6/4 of the payload on in 2.25 s: a payload a second.
    host = {"all_gather": 0.75, "all_reduce": 1.5, "tiny": 0.6}
    free, slow = find_links([1e12, 8000.0], host, 4)
    assert free == Link(pytest.approx(PAYLOAD), pytest.approx(0.1))  # type: ignore[arg-type]
    assert slow.bandwidth == 1000.0
