"""A mistake made on one rank only reaches every rank as an error, and no rank waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import distmuon
from distmuon.errors import ConfigError, RankMismatchError, SynchronizationError
from tests.dist.scenario import Case, backward, digest, gradients, optimizer, parameters
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
    def body(rank: int, world: int) -> tuple[str, int, str]:
        params = parameters()
        opt = optimizer(params, Case())
        before = digest((opt.state_dict(), params))
        with pytest.raises(RankMismatchError) as caught:
            lr = -1.0 if rank == 1 else 1.0
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "kind": "adamw", "lr": lr})
        assert digest((opt.state_dict(), params)) == before
        return str(caught.value), len(opt.param_groups), before

    results = run_threads(2, body)
    assert all('"lr" = -1.0' in message for message, _, _ in results)
    assert len({groups for _, groups, _ in results}) == 1


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
        with pytest.raises(RankMismatchError) as caught:
            for step in range(2):
                given = gradients(Case(), step, 0, rank, world)
                scaled = {name: None if grad is None else grad * scaler.get_scale() for name, grad in given.items()}
                if rank == 1 and step == 0:
                    scaled = {name: None if grad is None else grad * torch.inf for name, grad in scaled.items()}
                scaler.scale(torch.ones(()))
                backward(params, scaled)
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
        return str(caught.value)

    assert all("distmuon.GradScaler" in message for message in run_threads(2, body))
