"""Gradients that are not finite: skipped together, and too many in a row are an error that names the parameters."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import distmuon
from distmuon.errors import ConfigError, NonFiniteGradientError
from tests.distributed.scenario import MODEL, Case, backward, digest, gradients, groups, optimizer, parameters
from tests.ranks import RankPool, run_threads

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
LIMIT = 5


def give(opt: Any, params: dict[str, torch.nn.Parameter], bad: dict[str, float], rank: int, world: int) -> None:
    """Gradients of a step with one bad element in some parameters."""
    opt.zero_grad()
    grads = gradients(Case(), 0, 0, rank, world)
    for name, value in bad.items():
        given = grads[name]
        assert given is not None
        given.view(-1)[-1] = value
    backward(params, grads)


def skip_until_error(rank: int, world: int, value: str, dtype: str, policy: str) -> tuple[Any, ...]:
    """Bad steps up to the error and one beyond, then a good one: what was raised when, and whether bits changed."""
    params = parameters(getattr(torch, dtype))
    opt = optimizer(params, Case(policy=policy, dtype=dtype, clip=1.0))
    before, raised = digest((params, opt.state_dict())), []
    for step in range(LIMIT + 1):
        # Another rank has the bad elements each time.
        bad = {"wide": BAD[value], "embed": BAD[value]} if rank == step % world else {}
        give(opt, params, bad, rank, world)
        try:
            opt.step()
        except NonFiniteGradientError as error:
            raised.append((step, str(error)))
    unchanged = digest((params, opt.state_dict())) == before
    give(opt, params, {}, rank, world)
    opt.step()
    return raised, unchanged, opt.skipped_steps, digest(params) != before, digest(params)


@pytest.mark.fault("F11")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_too_many_in_a_row(world: int, figure: Callable[[str], None]) -> None:
    kinds = list(itertools.product(BAD, ("float32", "bfloat16"), ("balanced", "flat", "team")))
    places: set[int] = set()
    for kind in kinds:
        results = run_threads(world, skip_until_error, *kind)
        assert len({str(result) for result in results}) == 1, "all ranks raise the same and go on alike"
        raised, unchanged, skipped, updated, _ = results[0]
        assert [step for step, _ in raised] == [LIMIT - 1, LIMIT], kind
        assert f"in {LIMIT} steps in a row" in raised[0][1]
        assert f"in {LIMIT + 1} steps in a row" in raised[1][1]
        assert all('"embed"' in text and '"wide"' in text and '"norm"' not in text for _, text in raised), raised
        assert (unchanged, skipped, updated) == (True, LIMIT + 1, True), kind
        places |= {raised[0][0] + 1}
    figure(
        f"{len(kinds)} runs at {world} ranks ({', '.join(BAD)}; fp32, bf16; 3 policies): every rank raised at skip "
        f"{', '.join(map(str, places))} naming both parameters, 0 bits changed until then, and went on after it"
    )


def skip(opt: Any, params: dict[str, torch.nn.Parameter], steps: str, rank: int, world: int) -> list[bool]:
    """Steps by letter, b for a bad one; which of them raised."""
    raised = []
    for kind in steps:
        give(opt, params, {"tall": math.nan} if kind == "b" and rank == world - 1 else {}, rank, world)
        try:
            opt.step()
            raised.append(False)
        except NonFiniteGradientError:
            raised.append(True)
    return raised


@pytest.mark.parametrize(
    ("limit", "steps", "where"),
    [(3, "bbgbbgbbb", [8]), (1, "gbg", [1]), (None, "b" * 12, []), (2, "bgbgbb", [5])],
)
def test_only_steps_in_a_row_count(limit: int | None, steps: str, where: list[int]) -> None:
    def body(rank: int, world: int) -> tuple[list[bool], int]:
        params = parameters()
        opt = optimizer(params, Case(), max_skipped_steps=limit)
        return skip(opt, params, steps, rank, world), opt.skipped_steps

    want = [place in where for place in range(len(steps))]
    assert run_threads(2, body) == [(want, steps.count("b"))] * 2
    single = parameters()
    muon = distmuon.Muon(groups(single), max_skipped_steps=limit)
    assert (skip(muon, single, steps, 0, 1), muon.skipped_steps) == (want, steps.count("b"))


def test_long_lists_are_cut() -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case(policy="flat"), max_skipped_steps=1)
        give(opt, params, dict.fromkeys(MODEL, math.inf), rank, world)
        with pytest.raises(NonFiniteGradientError) as caught:
            opt.step()
        return str(caught.value)

    texts = run_threads(3, body)
    assert len(set(texts)) == 1
    assert sum(f'"{name}"' in texts[0] for name in MODEL) == 5
    assert f"and {len(MODEL) - 5} more" in texts[0]


def test_steps_of_a_grad_scaler_do_not_count() -> None:
    """Its scale is far too large at first, by design."""

    def body(rank: int, world: int) -> tuple[int, bool]:
        params = parameters()
        opt = optimizer(params, Case(), max_skipped_steps=2)
        scaler = distmuon.GradScaler("cpu", init_scale=2.0**20)
        for _ in range(6):
            opt.zero_grad()
            # Finite below a scale of 2^15 only.
            size = math.inf if scaler.get_scale() > 2.0**15 else 1.0
            backward(params, gradients(Case(), 0, 0, rank, world), scaler.scale(torch.tensor(1.0)) * size)
            scaler.step(opt)
            scaler.update()
        return opt.skipped_steps, all(bool(param.isfinite().all()) for param in params.values())

    assert run_threads(2, body) == [(5, True)] * 2


@pytest.mark.parametrize("limit", [0, -1, 2.5, "many"])
def test_limits_are_checked(limit: Any) -> None:
    for build in (distmuon.Muon, distmuon.DistMuon):
        with pytest.raises(ConfigError, match="max_skipped_steps"):
            build(groups(parameters()), max_skipped_steps=limit)


def overflow_on_one_rank(rank: int, world: int, group: Any) -> tuple[float, int, float, str, bool]:
    """One step under a GradScaler whose last rank overflows: seconds, skips, scale, bits, whether they changed."""
    params = parameters()
    opt = optimizer(params, Case(clip=1.0), group)
    scaler = distmuon.GradScaler("cpu", init_scale=2.0**8)
    grads = gradients(Case(), 0, 0, rank, world)
    if rank == world - 1:
        grads["tall"] = torch.full((32, 8), math.inf)
    before = digest((params, opt.state_dict()))
    begun = time.monotonic()
    backward(params, grads, scaler.scale(torch.tensor(1.0)))
    scaler.step(opt)
    scaler.update()
    seconds = time.monotonic() - begun
    after = digest((params, opt.state_dict()))
    return seconds, opt.skipped_steps, scaler.get_scale(), after, after == before


@pytest.mark.fault("F12")
@pytest.mark.parametrize("world", [2, 4])
def test_overflow_on_one_rank_is_everybodys(pool: RankPool, world: int, figure: Callable[[str], None]) -> None:
    results = pool.run(world, overflow_on_one_rank)
    assert {result[1:3] for result in results} == {(1, 2.0**7)}
    assert len({bits for *_, bits, _ in results}) <= world
    assert all(unchanged for *_, unchanged in results)
    worst = max(seconds for seconds, *_ in results)
    figure(
        f"inf on 1 of {world} ranks: all skipped and halved the scale, no bit changed, within {worst:.2f} s; 0 hangs"
    )
    assert worst < 1.0
