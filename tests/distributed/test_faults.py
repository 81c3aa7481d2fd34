"""Bad numbers: every rank does the same documented thing with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.scenario import (
    EXACT_NS,
    LARGE_MB,
    MODEL,
    SMALL_MB,
    Case,
    Gradients,
    Run,
    advance,
    backward,
    digest,
    gradients,
    optimizer,
    parameters,
    plain,
    reference,
    train,
    update_error,
)
from tests.oracle import relative
from tests.ranks import RankPool, run_threads

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("victim", ["wide", "embed"])
@pytest.mark.parametrize("bad_step", [0, 1, 3])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("world", "policy"), [(1, "balanced"), (2, "flat"), (4, "balanced")])
def test_non_finite_gradient(world: int, policy: str, value: str, bad_step: int, victim: str) -> None:
    """One bad element on one rank: every rank skips that step and only that step, with no bit changed."""
    case = Case(policy=policy, steps=4, clip=1.0)

    def source(case: Case, step: int, micro: int, rank: int, ranks: int) -> Gradients:
        grads = gradients(case, step, micro, rank, ranks)
        gradient = grads[victim]
        assert gradient is not None
        if step == bad_step and rank == ranks - 1:
            gradient[-1, -1] = BAD[value]
        return grads

    def body(rank: int, ranks: int) -> Run:
        params = parameters()
        opt = optimizer(params, case)
        for step in range(case.steps):
            before = digest((params, opt.state_dict()))
            advance(params, opt, [source(case, step, 0, rank, ranks)])
            opt.step()
            opt.zero_grad()
            assert (digest((params, opt.state_dict())) == before) == (step == bad_step)
        return Run(plain(params), [digest(params)], skipped=opt.skipped_steps)

    runs = run_threads(world, body)
    assert {(run.skipped, *run.digests) for run in runs} == {(1, *runs[0].digests)}
    assert update_error(runs[0], reference(case, world, source)) < EXACT_NS


def nan_in_process(rank: int, world: int, group: Any) -> tuple[int, bool]:
    """One step whose last rank has a NaN: steps skipped, and whether every bit stayed."""
    params = parameters()
    opt = optimizer(params, Case(policy="flat", clip=1.0), group)
    grads = gradients(Case(), 0, 0, rank, world)
    if rank == world - 1:
        grads["odd"] = torch.full((5, 7), math.nan)
    backward(params, grads)
    before = digest((params, opt.state_dict()))
    opt.step()
    return opt.skipped_steps, digest((params, opt.state_dict())) == before


@pytest.mark.parametrize("world", [2, 4])
def test_processes_skip_together(pool: RankPool, world: int) -> None:
    assert pool.run(world, nan_in_process) == [(1, True)] * world


def test_sum_that_overflows_is_skipped() -> None:
    """Every rank's gradient is finite, their sum is not."""

    def body(rank: int, world: int) -> tuple[int, bool]:
        params = parameters()
        opt = optimizer(params, Case())
        before = digest(params)
        backward(params, {"wide": torch.full((8, 32), 3e38)})
        opt.step()
        return opt.skipped_steps, digest(params) == before

    assert run_threads(2, body) == [(1, True)] * 2


ABSENT: dict[str, Callable[[str, int, int, int], bool]] = {
    "one rank has no gradient of some": lambda name, step, rank, world: rank == 0 and name in ("wide", "embed"),
    "no rank has a gradient of some": lambda name, step, rank, world: name in ("wide", "norm", "row"),
    "one rank has none at all": lambda name, step, rank, world: rank == world - 1,
    "each rank misses another, in turn": lambda name, step, rank, world: turn(name, step) % world == rank,
    "an expert never used": lambda name, step, rank, world: name == "experts",
    "none anywhere after the first step": lambda name, step, rank, world: step > 0,
}


def turn(name: str, step: int) -> int:
    """A number that walks over parameters and steps."""
    return list(MODEL).index(name) + step


@pytest.mark.fault("F13")
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("bucket_mb", [SMALL_MB, LARGE_MB])
@pytest.mark.parametrize("rule", ABSENT)
def test_missing_gradient_counts_as_zero(
    rule: str, bucket_mb: float, policy: str, figure: Callable[[str], None]
) -> None:
    case = Case(policy=policy, bucket_mb=bucket_mb, clip=1.0)

    def source(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
        full = gradients(case, step, micro, rank, world)
        return {name: None if ABSENT[rule](name, step, rank, world) else g for name, g in full.items()}

    runs = run_threads(3, train, case, None, source)
    assert len({tuple(run.digests) for run in runs}) == 1
    error = update_error(runs[0], reference(case, 3, source))
    figure(f"{rule}, {policy}: 3 equal ranks, {error:.1e} from the reference, where None is zero")
    assert error < EXACT_NS


def test_gradient_order_may_differ_between_ranks() -> None:
    """Ranks whose backward reaches the parameters in another order still reduce the same buckets together."""
    case = Case()

    def source(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
        return gradients(case, step, micro, rank, world)

    def body(rank: int, world: int) -> Run:
        params = parameters()
        opt = optimizer(params, case)
        order = dict(list(params.items())[:: -1 if rank else 1])
        for step in range(case.steps):
            backward(order, source(case, step, 0, rank, world))
            opt.step()
            opt.zero_grad()
        return Run(plain(params))

    assert update_error(run_threads(3, body)[2], reference(case, 3, source)) < EXACT_NS


@pytest.mark.fault("F14", "S11")
@pytest.mark.parametrize("ns", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
def test_zero_gradients_do_nothing(policy: str, ns: str, figure: Callable[[str], None]) -> None:
    def source(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
        return {name: torch.zeros(shape) for name, (shape, _) in MODEL.items()}

    case = Case(policy=policy, ns=ns, weight_decay=0.0, clip=1.0)
    start = digest(parameters())
    kept = [at == start for run in run_threads(3, train, case, None, source) for at in run.digests]
    figure(f"{policy}, {ns}, all gradients zero: no bit changed in {sum(kept)} of {len(kept)} steps of 3 ranks")
    assert all(kept)


@pytest.mark.fault("F14")
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-30, 2.0**-45, 2.0**-60, 2.0**50, 2.0**100])
@pytest.mark.parametrize("ns", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
def test_size_of_gradient_does_not_matter(policy: str, ns: str, scale: float, figure: Callable[[str], None]) -> None:
    """From 1e-18 to 1e30 the update stays what it is; powers of two, so that no rounding changes."""

    def scaled(by: float) -> dict[str, torch.Tensor]:
        def source(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
            return {
                name: g * by if g is not None and MODEL[name][1] == "muon" else None
                for name, g in gradients(case, step, micro, rank, world).items()
            }

        run = run_threads(3, train, Case(policy=policy, ns=ns, weight_decay=0.0, steps=1), None, source)[0]
        assert run.skipped == 0
        start = plain(parameters())
        return {name: torch.tensor(run.params[name]) - torch.tensor(start[name]) for name in MODEL}

    unit, small = scaled(1.0), scaled(scale)
    names = [name for name, (_, kind) in MODEL.items() if kind == "muon"]
    worst = max(relative(small[name], unit[name]) for name in names)
    figure(f"{policy}, {ns}, gradients times {scale:.2g}: no update changes by more than {worst:.1e}")
    for name, (_, kind) in MODEL.items():
        if kind == "muon":
            assert float(small[name].norm() / unit[name].norm()) == pytest.approx(1.0, abs=0.01), name
            assert relative(small[name], unit[name]) < 1e-4, name
