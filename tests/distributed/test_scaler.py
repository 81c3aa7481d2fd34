"""Loss scaling and clipping: on raw gradients, the same on every rank, p.grad untouched."""

from __future__ import annotations

import math

import pytest
import torch

import distmuon
from distmuon.errors import SynchronizationError
from tests.distributed.scenario import (
    EXACT_NS,
    Case,
    Gradients,
    Run,
    backward,
    digest,
    gradients,
    optimizer,
    oracle,
    parameters,
    plain,
    reference,
    train,
    update_error,
)
from tests.ranks import run_threads


def scaler_run(rank: int, world: int, overflow_at: int | None, clip: float | None) -> Run:
    params = parameters()
    opt = optimizer(params, Case(clip=clip))
    scaler = distmuon.GradScaler("cpu", init_scale=2.0**10)
    digests = []
    for step in range(4):
        grads = gradients(Case(), step, 0, rank, world)
        if step == overflow_at and rank == 0:
            grads["tall"] = torch.full((32, 8), math.inf)
        backward(params, grads, scaler.scale(torch.tensor(1.0)))
        before = digest((params, opt.state_dict()))
        scaler.step(opt)
        scaler.update()
        assert (digest((params, opt.state_dict())) == before) == (step == overflow_at)
        opt.zero_grad()
        digests.append(digest(params))
    return Run(plain(params), digests, skipped=opt.skipped_steps)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("overflow_at", [None, 0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_grad_scaler(world: int, overflow_at: int | None, clip: float | None) -> None:
    """Overflow on one rank skips on all; the steps after it are right although scales adapt."""
    runs = run_threads(world, scaler_run, overflow_at, clip)
    assert len({tuple(run.digests) for run in runs}) == 1
    assert {run.skipped for run in runs} == {0 if overflow_at is None else 1}
    against = oracle(Case(clip=clip))
    for step in range(4):
        if step != overflow_at:
            against.step([gradients(Case(), step, 0, rank, world) for rank in range(world)])
    assert update_error(runs[0], against) < EXACT_NS


def test_grad_scaler_unscale_is_refused() -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        scaler = distmuon.GradScaler("cpu", init_scale=8.0)
        backward(params, gradients(Case(), 0, 0, rank, world), scaler.scale(torch.tensor(1.0)))
        before = digest((params, opt.state_dict()))
        with pytest.raises(SynchronizationError) as caught:  # noqa: PT012  (either call may raise)
            scaler.unscale_(opt)
            scaler.step(opt)
        assert digest((params, opt.state_dict())) == before
        return str(caught.value)

    assert all("clip_grad_norm_" in message for message in run_threads(2, body))


@pytest.mark.parametrize("init_scale", [None, 2.0**8])
@pytest.mark.parametrize("world", [1, 3])
def test_clip_grad_norm(world: int, init_scale: float | None) -> None:
    """It returns the global raw norm on every rank and clips the coming step only; p.grad stays as it is."""

    def body(rank: int, ranks: int) -> tuple[float, Run]:
        params = parameters()
        opt = optimizer(params, Case())
        scaler = distmuon.GradScaler("cpu", init_scale=init_scale or 1.0, enabled=init_scale is not None)
        norm = math.nan
        for step in range(3):
            backward(params, gradients(Case(), step, 0, rank, ranks), scaler.scale(torch.tensor(1.0)))
            before = digest([p.grad for p in params.values()])
            if step == 0:
                norm = float(opt.clip_grad_norm_(0.5, loss_scale=scaler.get_scale()))
            scaler.step(opt)
            assert digest([p.grad for p in params.values()]) == before
            opt.zero_grad()
            scaler.update()
        return norm, Run(plain(params))

    results = run_threads(world, body)
    against = oracle(Case())
    for step in range(3):
        against.max_grad_norm = 0.5 if step == 0 else None
        norm = against.step([gradients(Case(), step, 0, rank, world) for rank in range(world)])
        if step == 0:
            assert [result[0] for result in results] == pytest.approx([norm] * world, rel=1e-6)
    assert update_error(results[0][1], against) < EXACT_NS


def test_clip_coefficient_has_the_usual_floor() -> None:
    """limit / (norm + 1e-6), as torch.nn.utils.clip_grad_norm_: visible where norms are that small."""
    case = Case(clip=1e-6, steps=3)

    def source(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
        size = (2e-8, 1e-6, 1e-7)[step]
        return {name: None if g is None else g * size for name, g in gradients(case, step, 0, rank, world).items()}

    against = reference(case, 2, source)
    for run in run_threads(2, train, case, None, source):
        assert update_error(run, against) < EXACT_NS


@pytest.mark.parametrize("accumulate", [None, torch.float32])
@pytest.mark.parametrize("unused", ["one", "all"])
def test_scaler_with_gradients_on_some_ranks_only(unused: str, accumulate: torch.dtype | None) -> None:
    """The order and number of collectives must not depend on which parameters a rank used."""

    def body(rank: int, world: int) -> tuple[int, float]:
        params = parameters()
        opt = optimizer(params, Case(), grad_accum_dtype=accumulate)
        scaler = distmuon.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        given = gradients(Case(), 0, 0, rank, world)
        if rank == 1:
            given = dict.fromkeys(given) if unused == "all" else {**given, next(iter(given)): None}
        backward(params, {name: None if grad is None else grad * 4.0 for name, grad in given.items()})
        scaler.step(opt)
        scaler.update()
        return opt.skipped_steps, scaler.get_scale()

    assert run_threads(2, body) == [(0, 4.0), (0, 4.0)]
