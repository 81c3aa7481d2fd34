"""What travels when: collectives as they are issued, against counts made by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from tests.ds.engines import (
    EXPERTS,
    HIDDEN,
    MATRICES,
    VOCAB,
    WIDTH,
    advance,
    build,
    config,
    count_orthogonalized,
    forward,
)
from tests.ds.session import STOCK
from tests.ds.trace import Call, Recorder
from tests.ranks import RankPool

ADAMW = 2 * VOCAB * WIDTH + WIDTH
DENSE = ADAMW + WIDTH * WIDTH + EXPERTS * WIDTH
EXPERT = 2 * WIDTH * HIDDEN


def traced(rank: int, world: int, group: Any, settings: Any, ep: int | None) -> dict[str, Any]:
    """Record one step, the second, micro-batch by micro-batch."""
    engine = build(settings, ep)
    advance(engine, 0, 1)
    gas, before_embedding = engine.gradient_accumulation_steps(), []
    optimizer, distmuon = engine.optimizer, hasattr(engine.optimizer, "traffic")
    if distmuon:
        optimizer.traffic.reset()
    with Recorder() as recorder, recorder.families(), count_orthogonalized() as batches:
        # The embedding's gradient is the last one of a backward pass.
        engine.module.embed.weight.register_hook(
            lambda gradient: before_embedding.append(len(recorder.select("reduce_scatter")))
        )
        for micro in range(gas):
            with recorder.phase("forward"):
                loss = forward(engine, 1, micro)
            with recorder.phase("boundary" if micro + 1 == gas else "accumulate"):
                engine.backward(loss)
            with recorder.phase("step"):
                engine.step()
    seen = {"calls": [asdict(call) for call in recorder.calls], "early": before_embedding}
    if distmuon:
        plans = optimizer.plans
        seen |= {
            "tally": optimizer.traffic.wire_bytes(),
            "buckets": [(plan.world, len(plan.buckets)) for plan in plans],
            "completion": sum(plan.completion_bytes(rank, 4) for plan in plans),
            "orthogonalized": sum(batches),
        }
    return seen


def calls(seen: dict[str, Any], *names: str, phase: str | None = None) -> list[Call]:
    recorder = Recorder()
    recorder.calls = [Call(**fields) for fields in seen["calls"]]
    return recorder.select(*names, phase=phase)


GRADIENT = ("reduce_scatter", "allgather", "broadcast", "reduce")
CASES = [
    pytest.param(world, ep, gas, policy, dtype, id=f"{world} ranks ep {ep} gas {gas} {policy} {dtype}")
    for world, ep, gas, policy, dtype in [
        (2, 1, 1, "balanced", "float32"),
        (2, 2, 2, "balanced", "float32"),
        (2, 1, 2, "flat", "bfloat16"),
        (2, 2, 1, "flat", "float32"),
        (4, 2, 2, "balanced", "bfloat16"),
    ]
]


@pytest.mark.parametrize(("world", "ep", "gas", "policy", "dtype"), CASES)
def test_collectives_of_a_step(
    request: pytest.FixtureRequest, world: int, ep: int, gas: int, policy: str, dtype: str
) -> None:
    pool: RankPool = request.getfixturevalue(f"ds{world}")
    settings = config(
        gradient_accumulation_steps=gas,
        params={"policy": policy, "bucket_mb": 0.004 if dtype == "float32" else 0.002},
        bf16={"enabled": dtype == "bfloat16"},
    )
    ranks = pool.run(world, traced, settings, ep)
    for seen in ranks:
        check_timing(seen)
        check_bytes(seen, world, ep, dtype)
    if policy == "balanced":  # experts of one expert-data-parallel rank belong to one of ep ranks
        assert sum(seen["orthogonalized"] for seen in ranks) == MATRICES


def check_timing(seen: dict[str, Any]) -> None:
    """Gradients are reduced while the last backward runs, and nowhere else."""
    for phase in ("forward", "accumulate"):
        assert calls(seen, *GRADIENT, phase=phase) == []
    assert calls(seen, "reduce_scatter", phase="step") == []
    assert calls(seen, "allgather", phase="boundary") == []
    buckets = sum(count for world, count in seen["buckets"] if world > 1)
    assert len(calls(seen, "reduce_scatter", phase="boundary")) == buckets
    # All but the bucket of the embedding itself are under way before backward is done.
    assert seen["early"] == [0] * (len(seen["early"]) - 1) + [buckets - 1]
    assert buckets > 1
    assert [call for call in calls(seen, "allreduce") if call.numel > 3] == []
    assert len(calls(seen, "allreduce", phase="step")) == 1


def check_bytes(seen: dict[str, Any], world: int, ep: int, dtype: str) -> None:
    """Every gradient is sent once and every parameter once, and at most d - 1 elements of padding a bucket."""
    groups = {world: DENSE + (EXPERTS * EXPERT if ep == 1 else 0)}
    if 1 < ep < world:
        groups[world // ep] = EXPERTS // ep * EXPERT
    gradient, parameter = (calls(seen, name) for name in ("reduce_scatter", "allgather"))
    wire = 0.0
    for ranks, numel in groups.items():
        buckets = dict(seen["buckets"])[ranks]
        for group in (gradient, parameter):
            sent = [call for call in group if call.world == ranks]
            assert {call.dtype for call in sent} == {dtype}
            assert numel <= sum(call.numel for call in sent) < numel + buckets * ranks
            wire += sum(call.wire for call in sent)
    assert wire == sum(call.wire for call in gradient + parameter)
    vote = 2 * 3 * 8 * (world - 1) // world
    assert seen["tally"] == wire + vote + seen["completion"]


def test_at_most_seven_tenths_of_stock_muon(ds2: RankPool) -> None:
    """Stock Muon under ZeRO-1 all-reduces gradients; both train the same model in the same precision."""
    wire = {}
    for name, optimizer in {"stock": STOCK["Muon"], "distmuon": config()["optimizer"]}.items():
        settings = {**config(), "optimizer": optimizer}
        seen = ds2.run(2, traced, settings, 1)[0]
        wire[name] = sum(call.wire for call in calls(seen, *GRADIENT, "allreduce", "alltoall"))
    assert wire["distmuon"] <= 0.70 * wire["stock"]


def state(rank: int, world: int, group: Any, settings: Any) -> dict[str, Any]:
    """Elements and dtypes of the optimizer state on this rank."""
    engine = build(settings, 1)
    advance(engine, 0, 1)
    entries = engine.optimizer.state_dict()["state"].values()
    tensors = [(key, value) for entry in entries for key, value in entry.items() if hasattr(value, "numel")]
    seen: dict[str, Any] = {"bytes": engine.optimizer.state_bytes(), "dtypes": {str(v.dtype) for _, v in tensors}}
    for key, value in tensors:
        seen[key] = seen.get(key, 0) + value.numel()
    return seen


@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("bf16", [False, True])
def test_state_is_sharded_and_float32(ds2: RankPool, bf16: bool, policy: str) -> None:
    total, padding = DENSE + EXPERTS * EXPERT, 2 * 4
    params = {"policy": policy, "bucket_mb": 25.0 if policy == "balanced" else 0.004}
    ranks = ds2.run(2, state, config(bf16={"enabled": bf16}, params=params))
    assert sum(seen["second_moment"] for seen in ranks) == ADAMW
    for seen in ranks:
        assert seen["dtypes"] == {"torch.float32"}
        assert total / 2 <= seen["first_moment"] <= total / 2 + padding
        assert seen.get("master", 0) == (seen["first_moment"] if bf16 else 0)
        assert seen["bytes"] == 4 * (seen["first_moment"] + seen["second_moment"] + seen.get("master", 0))
