"""A mistake made on one rank only reaches every rank as an error, and no rank waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import distmuon
from distmuon.errors import ConfigError, RankMismatchError, SynchronizationError
from tests.distributed.scenario import Case, backward, digest, gradients, optimizer, parameters
from tests.ranks import run_threads


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"policy": "zero"}, {"params": []}])
def test_at_construction(settings: dict[str, Any], everywhere: bool) -> None:
    """The rank at fault and the others raise; if all are at fault, each gets its own plain error."""

    def body(rank: int, world: int) -> tuple[type, str]:
        arguments = {"params": list(parameters().values())}
        arguments |= settings if everywhere or rank == 1 else {}
        with pytest.raises((ConfigError, RankMismatchError)) as caught:
            distmuon.DistMuon(**arguments)
        return caught.type, str(caught.value)

    results = run_threads(2, body)
    assert {kind for kind, _ in results} == {ConfigError if everywhere else RankMismatchError}
    assert all(next(iter(settings)) in message for _, message in results)


def test_when_a_group_is_added() -> None:
    """The rank at fault raises at once, the others at the next step, since none waits for another before."""

    def body(rank: int, world: int) -> tuple[str, int]:
        params = parameters()
        opt = optimizer(params, Case())
        before = digest((opt.state_dict(), params))
        late = ("late", torch.nn.Parameter(torch.ones(3)))
        group = {"params": [late], "kind": "adamw", "lr": -1.0 if rank == 1 else 1.0}
        with pytest.raises(ConfigError, match='"lr" = -1.0') if rank == 1 else contextlib.nullcontext():
            opt.add_param_group(group)
        with pytest.raises(RankMismatchError) as caught:
            opt.step()
        assert digest((opt.state_dict(), params)) == before
        return str(caught.value), len(opt.param_groups)

    results = run_threads(2, body)
    assert all("param groups of 3 where rank 1 has a number of param groups of 2" in message for message, _ in results)
    assert [groups for _, groups in results] == [2, 2]


def clip(params: dict[str, torch.nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(params.values(), 0.1)


def scale(params: dict[str, torch.nn.Parameter]) -> None:
    grad = next(iter(params.values())).grad
    assert grad is not None
    grad.mul_(2)


@pytest.mark.parametrize("change", [clip, scale])
@pytest.mark.parametrize("everywhere", [False, True])
def test_gradient_changed_after_it_was_reduced(
    change: Callable[[dict[str, torch.nn.Parameter]], None], everywhere: bool
) -> None:
    """torch's clipping between backward and step would have no effect: it is refused, and the optimizer goes on."""

    def body(rank: int, world: int) -> tuple[type, str]:
        params = parameters()
        opt = optimizer(params, Case())
        before = digest((opt.state_dict(), params))
        backward(params, gradients(Case(), 0, 0, rank, world))
        if everywhere or rank == 1:
            change(params)
        with pytest.raises((SynchronizationError, RankMismatchError)) as caught:
            opt.step()
        assert digest((opt.state_dict(), params)) == before
        opt.zero_grad()
        backward(params, gradients(Case(), 0, 0, rank, world))
        opt.step()
        return caught.type, str(caught.value)

    results = run_threads(2, body)
    assert {kind for kind, _ in results} == {SynchronizationError if everywhere else RankMismatchError}
    assert all("clip_grad_norm_" in message for _, message in results)


def test_plain_grad_scaler_that_parts_is_named() -> None:
    """torch's own scaler decides on each rank alone; the step after an overflow on one rank says what to use."""

    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

        def one_step(step: int, factor: float) -> None:
            given = gradients(Case(), step, 0, rank, world)
            scaler.scale(torch.ones(()))
            backward(params, {name: None if grad is None else grad * factor for name, grad in given.items()})
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

        one_step(0, torch.inf if rank == 1 else scaler.get_scale())
        with pytest.raises(RankMismatchError) as caught:
            one_step(1, scaler.get_scale())
        return str(caught.value)

    assert all("distmuon.GradScaler" in message for message in run_threads(2, body))


@pytest.mark.parametrize("clipped_first", [False, True])
def test_parameter_frozen_on_one_rank(clipped_first: bool) -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        before = digest((opt.state_dict(), params))
        backward(params, gradients(Case(), 0, 0, rank, world))
        if clipped_first:
            opt.clip_grad_norm_(1.0)
        next(iter(params.values())).requires_grad_(rank == 0)
        with pytest.raises(RankMismatchError) as caught:
            opt.step()
        assert digest((opt.state_dict(), params)) == before
        return str(caught.value)

    assert all("rank 1 failed" in message and "frozen" in message for message in run_threads(2, body))


@pytest.mark.parametrize("norms", [(1.0, 1e-3), (1.0, -1.0)])
def test_ranks_clip_differently(norms: tuple[float, float]) -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        backward(params, gradients(Case(), 0, 0, rank, world))
        with pytest.raises(RankMismatchError) as caught:
            opt.clip_grad_norm_(norms[rank])
        return str(caught.value)

    assert all("max_norm" in message for message in run_threads(2, body))


def test_learning_rate_changed_between_clip_and_step() -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        backward(params, gradients(Case(), 0, 0, rank, world))
        opt.clip_grad_norm_(1.0)
        opt.param_groups[0]["lr"] *= 1 + rank
        with pytest.raises(RankMismatchError) as caught:
            opt.step()
        return str(caught.value)

    assert all('"lr"' in message for message in run_threads(2, body))


def test_state_that_fits_one_rank_only() -> None:
    """Rank 0's shard given to all, as a script that saves on rank 0 only would do."""

    def body(rank: int, world: int) -> str:
        opt = optimizer(parameters(), Case())
        saved = {**opt.state_dict(), "shard": {**opt.state_dict()["shard"], "rank": 0}}
        with pytest.raises(RankMismatchError) as caught:
            opt.load_state_dict(saved)
        return str(caught.value)

    assert all("rank 1 failed" in message and "rank 0's shard" in message for message in run_threads(2, body))


def test_parameters_that_start_different() -> None:
    def body(rank: int, world: int) -> str:
        with pytest.raises(RankMismatchError) as caught:
            distmuon.DistMuon([("weight", torch.nn.Parameter(torch.full((3, 3), 1.0 + rank)))])
        return str(caught.value)

    assert all('initial values of "weight"' in message for message in run_threads(2, body))


def test_gradient_replaced_after_it_was_reduced() -> None:
    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        backward(params, gradients(Case(), 0, 0, rank, world))
        for param in params.values():
            param.grad = None if param.grad is None else param.grad * 0
        with pytest.raises(SynchronizationError) as caught:
            opt.step()
        return str(caught.value)

    assert all("changed after it was reduced" in message for message in run_threads(2, body))


def test_gradient_assigned_by_hand_is_accumulated() -> None:
    """With float32 accumulation hooks take gradients away; one that came without a backward counts all the same."""

    def body(rank: int, world: int) -> list[bool]:
        params = {name: torch.nn.Parameter(torch.ones(4, 4)) for name in ("hooked", "by_hand")}
        opt = distmuon.DistMuon(list(params.items()), lr=0.1, grad_accum_dtype=torch.float32)
        params["by_hand"].grad = torch.eye(4)
        (params["hooked"] * torch.eye(4)).sum().backward()
        opt.step()
        return [bool((param.detach() != 1).any()) for param in params.values()]

    assert run_threads(2, body) == [[True, True], [True, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_cast_after_construction(dtype: torch.dtype) -> None:
    def body(rank: int, world: int) -> str:
        model = torch.nn.Linear(4, 4)
        torch.nn.init.ones_(model.weight), torch.nn.init.ones_(model.bias)
        opt = distmuon.DistMuon(model.named_parameters())
        model.to(dtype)
        with pytest.raises(ValueError, match="was float32") as caught:
            opt.step()
        return str(caught.value)

    assert all("cast, move or reshape" in message for message in run_threads(2, body))
