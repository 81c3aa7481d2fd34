"""What torch promises of rates and param groups, kept by DistMuon on several ranks."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import distmuon
from distmuon.errors import RankMismatchError, SynchronizationError
from tests.distributed.scenario import Case, backward, digest, gradients, optimizer, parameters
from tests.problems import Figure, descend, lines
from tests.ranks import RankPool, run_threads
from tests.rates import SCHEDULERS, STEPS


def step(params: dict[str, Parameter], opt: Any, number: int, rank: int, world: int) -> None:
    opt.zero_grad()
    backward(params, gradients(Case(), number, 0, rank, world))
    opt.step()


def schedule(rank: int, world: int, name: str, tensor: bool) -> tuple[int, float, str]:
    """Steps that went down, the largest difference from the rate by hand, and the end of a linear descent."""
    params, slopes = lines()
    rates = [torch.tensor(rate, dtype=torch.float64) if tensor else rate for rate in (0.1, 0.05)]
    opt = distmuon.DistMuon(params.items(), lr=rates[0], adamw_lr=rates[1], weight_decay=0.0, bucket_mb=5e-5)
    held = [group["lr"] for group in opt.param_groups]
    scheduler = SCHEDULERS[name].build(opt)
    fell, error = 0, 0.0
    for number in range(STEPS):
        for group, start in zip(opt.param_groups, (0.1, 0.05), strict=True):
            error = max(error, abs(float(group["lr"]) - SCHEDULERS[name].rate(number, start)))
        opt.zero_grad()
        loss = descend(params, slopes)
        (loss * (1 + rank)).backward()
        opt.step()
        fell += bool(descend(params, slopes) < loss)
        scheduler.step(*([1.0] if SCHEDULERS[name].metric else []))
    assert not tensor or all(group["lr"] is one for group, one in zip(opt.param_groups, held, strict=True))
    return fell, error, digest(params)


@pytest.mark.fault("F20")
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_every_scheduler(world: int, tensor: bool, figure: Figure) -> None:
    results = {name: run_threads(world, schedule, name, tensor) for name in SCHEDULERS}
    fell = sum(down for ranks in results.values() for down, _, _ in ranks)
    worst = max(error for ranks in results.values() for _, error, _ in ranks)
    alike = sum(len({end for _, _, end in ranks}) == 1 for ranks in results.values())
    figure(
        f"{world} ranks, {'tensor' if tensor else 'float'} rates: {len(results)} schedulers, down in {fell} of "
        f"{len(results) * world * STEPS} steps, rates within {worst:.0e} of by hand, all ranks alike in {alike}"
    )
    assert fell == len(results) * world * STEPS
    assert worst < 1e-12
    assert alike == len(results)


@pytest.mark.fault("F20")
def test_tensor_rate_that_is_filled_on_one_rank_only(figure: Figure) -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case(), lr=torch.tensor(0.1))
        step(params, opt, 0, rank, world)
        before = digest((params, opt.state_dict()["state"]))
        opt.param_groups[0]["lr"].mul_(1 + rank)
        with pytest.raises(RankMismatchError) as caught:
            step(params, opt, 1, rank, world)
        assert digest((params, opt.state_dict()["state"])) == before
        return str(caught.value)

    messages = run_threads(2, body)
    assert all('setting "lr" of param group 0' in message for message in messages)
    figure(f"a tensor rate filled on one rank only: {len(messages)} of 2 ranks raise, nothing written")


def late(world: int) -> dict[str, Any]:
    """Three parameters in two param groups, as ``to_groups`` splits them."""
    names = {"late.w": (6, 8), "late.b": (5,), "late.v": (8, 3)}
    return {"params": [(name, Parameter(torch.ones(shape))) for name, shape in names.items()], "lr": 0.25}


@pytest.mark.fault("F20")
@pytest.mark.parametrize(("policy", "world"), [("balanced", 4), ("flat", 2), ("team", 2)])
def test_group_added_on_all_ranks(world: int, policy: str, figure: Figure) -> None:
    """The old parameters go on as if alone, the new ones as from the start of another optimizer."""

    def body(rank: int, world: int, joined: bool) -> tuple[str, str]:
        params, group = parameters(), late(world)
        new = dict(group["params"])
        opt = optimizer(params, Case(policy=policy))
        other: Any = None
        for number in range(6):
            if number == 3 and joined:
                opt.add_param_group(group)
            elif number == 3:
                other = distmuon.DistMuon(
                    [group], weight_decay=0.1, adamw_lr=0.25, policy=policy, ns=opt.settings.ns, bucket_mb=0.0006
                )
            used = [opt] if joined or other is None else [opt, other]
            for each in used:
                each.zero_grad()
            if number >= 3:
                torch.stack([(p * (1 + rank + number)).sum() for p in new.values()]).sum().backward()
            backward(params, gradients(Case(exact=True), number, 0, rank, world))
            for each in used:
                each.step()
        return digest(params), digest(new)

    ends = [run_threads(world, body, joined) for joined in (True, False)]
    alike = sum(one == other for one, other in zip(*ends, strict=True))
    assert len({*ends[0], *ends[1]}) == 1
    figure(f"{policy}, {world} ranks, groups added after 3 of 6 steps on all: {alike} ranks as with two optimizers")


def add_alone(rank: int, world: int, group: Any, meet: str, odd: int) -> tuple[str, float, bool]:
    """A group added on one rank only: what every rank raises where they meet next, and whether all go on well."""
    params = parameters()
    opt = optimizer(params, Case(), group)
    step(params, opt, 0, rank, world)
    saved = copy.deepcopy(opt.state_dict())
    if rank == odd:
        opt.add_param_group(late(world))
    opt.zero_grad()
    backward(params, gradients(Case(), 1, 0, rank, world))
    before = digest(params)
    meetings: dict[str, Callable[[], Any]] = {
        "step": opt.step,
        "clip": lambda: opt.clip_grad_norm_(1.0),
        "load": lambda: opt.load_state_dict(saved),
    }
    start = time.monotonic()
    with pytest.raises(RankMismatchError) as caught:
        meetings[meet]()
    seconds = time.monotonic() - start
    assert digest(params) == before
    assert digest(opt.state_dict()) == digest(saved)
    step(params, opt, 1, rank, world)
    against = parameters()
    undisturbed = optimizer(against, Case(), group)
    for number in range(2):
        step(against, undisturbed, number, rank, world)
    return str(caught.value), seconds, digest(params) == digest(against)


def check_alone(results: list[tuple[str, float, bool]], what: str, figure: Figure) -> None:
    messages = {message for message, _, _ in results}
    (message,) = messages
    assert "a number of param groups of 4" in message
    assert "a number of param groups of 2" in message or "a state dict" in message
    assert all(seconds < 2 and well for _, seconds, well in results)
    slowest = 1000 * max(seconds for _, seconds, _ in results)
    figure(f"{what}: {len(results)} of {len(results)} ranks raise within {slowest:.0f} ms, and go on bit for bit")


@pytest.mark.fault("F15", "F20")
@pytest.mark.parametrize("meet", ["step", "clip", "load"])
@pytest.mark.parametrize(("world", "odd"), [(2, 0), (2, 1), (4, 2)])
def test_group_added_on_one_rank_only(world: int, odd: int, meet: str, figure: Figure) -> None:
    results = run_threads(world, lambda rank, world: add_alone(rank, world, None, meet, odd))
    check_alone(results, f"param groups added on rank {odd} of {world} only, told in {meet}", figure)


@pytest.mark.fault("F15", "F20")
def test_group_added_in_one_process_only(pool: RankPool, figure: Figure) -> None:
    check_alone(pool.run(2, add_alone, "step", 0), "gloo, 2 ranks, param groups added on one", figure)


@pytest.mark.parametrize("change", ["lr", "name", "shape"])
def test_groups_added_that_differ(change: str) -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        group: dict[str, Any] = {"params": [("late", Parameter(torch.ones(3)))]}
        if rank == 1:
            shape = (4,) if change == "shape" else (3,)
            group["params"] = [("other" if change == "name" else "late", Parameter(torch.ones(shape)))]
            group |= {"lr": 0.5} if change == "lr" else {}
        opt.add_param_group(group)
        with pytest.raises(RankMismatchError) as caught:
            step(params, opt, 0, rank, world)
        assert len(opt.param_groups) == 2
        step(params, opt, 0, rank, world)
        return str(caught.value)

    messages = run_threads(2, body)
    assert len(set(messages)) == 1
    assert {"lr": '"lr"', "name": '"other"', "shape": "(4,)"}[change] in messages[0]


@pytest.mark.parametrize("read", ["plans", "reductions", "state_dict", "state_bytes", "copy"])
def test_added_groups_are_shown_once_they_are_placed(read: str) -> None:
    """No property waits for other ranks: on its own, one that reads is told what to call."""

    def look(opt: Any) -> Any:
        if read == "copy":
            return copy.deepcopy(opt)
        found = getattr(opt, read)
        return found() if callable(found) else found

    def body(rank: int, world: int) -> tuple[int, int]:
        opt = optimizer(parameters(), Case())
        buckets = len(opt.reductions)
        opt.add_param_group(late(world))
        if rank == 0:
            with pytest.raises(SynchronizationError, match="call optimizer.check_agreement"):
                look(opt)
        opt.check_agreement()
        opt = look(opt) if read == "copy" else opt
        look(opt)
        return len(opt.reductions) - buckets, len(opt.plans)

    assert run_threads(2, body) == [(1, 2), (1, 2)]
