"""Bit-level promises: world size, policy, micro-batches, repetition and resuming change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch

import distmuon
from tests.distributed.scenario import (
    LARGE_MB,
    SMALL_MB,
    Case,
    Gradients,
    advance,
    digest,
    gradients,
    groups,
    leaves,
    optimizer,
    parameters,
    train,
)
from tests.distributed.scenario import train_in_process as train_plain
from tests.ranks import RankPool, run_threads

Figure = Callable[[str], None]
WORLDS = [1, 2, 3, 4, 8]
CASES = [
    Case(exact=True, ns=ns, clip=clip, dtype=dtype)
    for ns, clip, dtype in [
        ("float32", None, "float32"),
        ("float32", 1.0, "float32"),
        ("bfloat16", None, "float32"),
        ("bfloat16", 1.0, "bfloat16"),
    ]
]


def name(case: Case) -> str:
    return f"ns-{case.ns},clip-{case.clip},{case.dtype}"


@cache
def alone(case: Case) -> tuple[str, ...]:
    """Digest of the parameters after every step on one rank."""
    return tuple(run_threads(1, train, case)[0].digests)


@pytest.mark.fault("F10")
@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("bucket_mb", [SMALL_MB, LARGE_MB])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("world", WORLDS)
def test_world_and_policy_change_no_bit(world: int, policy: str, bucket_mb: float, case: Case, figure: Figure) -> None:
    """The same mean gradient gives the same bits on every rank after every step."""
    runs = run_threads(world, train, replace(case, policy=policy, bucket_mb=bucket_mb))
    assert len(set(alone(case))) == case.steps
    different = sum(tuple(run.digests) != alone(case) for run in runs)
    figure(f"{policy}, {name(case)}: {different} of {world} ranks differ from one rank in a bit")
    assert different == 0


@pytest.mark.fault("F10")
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_give_the_same_bits(pool: RankPool, world: int, policy: str, figure: Figure) -> None:
    case = CASES[3]
    answers = pool.run(world, train_plain, asdict(replace(case, policy=policy)))
    different = sum(tuple(answer["digests"]) != alone(case) for answer in answers)
    figure(f"{policy}, {name(case)}: {different} of {world} gloo ranks differ from one rank in a bit")
    assert different == 0


@pytest.mark.parametrize("case", CASES, ids=name)
def test_no_process_group_is_one_rank(case: Case) -> None:
    """Outside torch.distributed the same code runs and communication is skipped."""
    assert not torch.distributed.is_initialized()
    assert tuple(train(0, 1, case).digests) == alone(case)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_reduce_dtype_changes_no_exact_bit(world: int) -> None:
    """Gradients whose sum fits into bfloat16 give the same bits whichever dtype sums them."""
    for run in run_threads(world, train, replace(CASES[1], reduce_dtype="bfloat16")):
        assert tuple(run.digests) == alone(CASES[1])


@pytest.mark.fault("F19")
@pytest.mark.parametrize("policy", ["balanced", "flat"])
def test_two_runs_are_equal(policy: str, figure: Figure) -> None:
    case = Case(policy=policy, ns="bfloat16", clip=1.0, accumulation=2)
    first, second = (run_threads(3, train, case) for _ in range(2))
    equal = sum(a.digests == b.digests for a, b in zip(first, second, strict=True))
    figure(f"{policy}: {equal} of {len(first)} ranks of a second run in the same process have the bits of the first")
    assert equal == len(first)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("world", [1, 3])
def test_micro_batches_change_no_bit(world: int, clip: float | None) -> None:
    """Four exact quarters behind no_sync are one whole gradient."""
    whole = Case(exact=True, clip=clip)

    def quarters(case: Case, step: int, micro: int, rank: int, ranks: int) -> Gradients:
        full = gradients(whole, step, 0, rank, ranks)
        return {key: g if g is None else g / 4 for key, g in full.items()}

    runs = run_threads(world, train, replace(whole, accumulation=4), None, quarters)
    assert all(tuple(run.digests) == alone(whole) for run in runs)


@pytest.mark.parametrize("world", [1, 2])
def test_plain_twin_gives_the_same_bits(world: int) -> None:
    case = Case(exact=True, ns="bfloat16", clip=1.0)
    params = parameters()
    opt = distmuon.Muon(
        groups(params),
        lr=case.lr,
        adamw_lr=case.adamw_lr,
        weight_decay=case.weight_decay,
        max_grad_norm=case.clip,
        ns=distmuon.NewtonSchulz.model_validate({"dtype": case.ns}),
    )
    for step in range(case.steps):
        for key, gradient in gradients(case, step, 0, 0, 1).items():
            params[key].grad = gradient
        opt.step()
    assert digest(params) == run_threads(world, train, case)[0].digests[-1]


def resume(rank: int, world: int, case: Case, cut: int) -> tuple[str, str]:
    """Digests of parameters and state: trained straight on, and through a state dict after ``cut`` steps."""
    params = parameters(case.torch_dtype)
    opt = optimizer(params, case)
    for step in range(2 * cut):
        if step == cut:
            saved = copy.deepcopy((dict(params), opt.state_dict()))
        advance(params, opt, [gradients(case, step, 0, rank, world)])
        opt.step()
        opt.zero_grad()
    fresh = saved[0]
    for p in fresh.values():
        p.grad = None
    other = optimizer(fresh, case)
    other.load_state_dict(saved[1])
    for step in range(cut, 2 * cut):
        advance(fresh, other, [gradients(case, step, 0, rank, world)])
        other.step()
        other.zero_grad()
    return digest((params, opt.state_dict())), digest((fresh, other.state_dict()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("world", "policy"), [(1, "balanced"), (3, "balanced"), (3, "flat")])
def test_resume_changes_no_bit(world: int, policy: str, dtype: str) -> None:
    for straight, resumed in run_threads(world, resume, Case(policy=policy, dtype=dtype, clip=1.0), 2):
        assert straight == resumed


def refusal(opt: Any, saved: Any) -> str:
    """The message with which an optimizer refuses a state dict, its own state untouched."""
    before = digest(opt.state_dict())
    with pytest.raises(distmuon.errors.StateError) as caught:
        opt.load_state_dict(saved)
    assert digest(opt.state_dict()) == before
    return str(caught.value)


@pytest.mark.parametrize("change", [{"policy": "flat"}, {"bucket_mb": LARGE_MB}], ids=str)
def test_state_of_another_plan_is_refused(change: dict[str, Any]) -> None:
    def body(rank: int, world: int) -> str:
        saved = optimizer(parameters(), replace(Case(), **change)).state_dict()
        return refusal(optimizer(parameters(), Case()), saved)

    assert all(run_threads(2, body))


def alike(order: list[int]) -> Any:
    """An optimizer of matrices that differ in name only, in this order."""
    matrices = [(f"w{i}", torch.nn.Parameter(torch.ones(4, 4))) for i in order]
    return distmuon.DistMuon([{"params": matrices, "kind": "muon"}])


def test_state_of_another_rank_is_refused() -> None:
    """Also where the shards of both ranks look alike."""

    def body(rank: int, world: int) -> str:
        opt = alike([0, 1, 2, 3])
        saved: list[Any] = [None] * world
        torch.distributed.all_gather_object(saved, opt.state_dict())
        return refusal(opt, saved[1 - rank])

    assert all("rank" in message for message in run_threads(2, body))


def test_state_of_another_order_is_refused() -> None:
    """Parameters of one shape that changed places would get each other's momentum."""

    def body(rank: int, world: int) -> str:
        return refusal(alike([0, 2, 1, 3]), alike([0, 1, 2, 3]).state_dict())

    assert all(run_threads(2, body))


def test_state_of_another_world_is_refused() -> None:
    saved = run_threads(2, lambda rank, world: optimizer(parameters(), Case()).state_dict())[0]

    def body(rank: int, world: int) -> str:
        return refusal(optimizer(parameters(), Case()), saved)

    assert all(run_threads(3, body))


def test_state_dict_holds_plain_values() -> None:
    """Tensors and plain values only, so that it can be saved without pickling code."""
    (state,) = run_threads(1, lambda rank, world: optimizer(parameters(), Case()).state_dict())
    kinds = {type(leaf) for _, leaf in leaves(state)}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
