"""What torch promises of a step, kept by Muon and by DistMuon on one rank: rates, closures, options, idle members."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import distmuon
from tests.distributed.scenario import digest
from tests.problems import Figure, advance, both, descend, lines, loss_of, network
from tests.rates import BY_TORCH, SCHEDULERS, STEPS


def test_every_scheduler_of_torch_is_here() -> None:
    assert set(SCHEDULERS) == BY_TORCH | {"SWALR"}


@pytest.mark.fault("F20")
@both
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, tensor: bool, build: Any, figure: Figure) -> None:
    """The rate is the one computed by hand, every step goes down by as much as it says, and a tensor stays one."""
    params, slopes = lines()
    given = [torch.tensor(rate, dtype=torch.float64) if tensor else rate for rate in (0.1, 0.05)]
    ns = distmuon.NewtonSchulz(dtype="float32")
    optimizer = build(params.items(), lr=given[0], adamw_lr=given[1], weight_decay=0.0, ns=ns)
    held = [group["lr"] for group in optimizer.param_groups]
    scheduled = SCHEDULERS[name]
    scheduler = scheduled.build(optimizer)
    error, fell, strides = 0.0, 0, []
    for step in range(STEPS):
        for group, start in zip(optimizer.param_groups, (0.1, 0.05), strict=True):
            error = max(error, abs(float(group["lr"]) - scheduled.rate(step, start)))
            assert group["momentum"] == pytest.approx(scheduled.momentum(step), rel=1e-12)
        optimizer.zero_grad()
        before, loss = params["w"].detach().clone(), descend(params, slopes)
        loss.backward()
        optimizer.step()
        fell += bool(descend(params, slopes) < loss)
        strides.append(float((params["w"].detach() - before).norm()) / scheduled.rate(step, 0.1))
        scheduler.step(*([1.0] if scheduled.metric else []))
    assert error < 1e-12
    assert fell == STEPS
    assert max(strides) < 1.001 * min(strides)
    assert not tensor or all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, held, strict=True))
    kind = "tensor" if tensor else "float"
    figure(f"{build.__name__}, {name}, {kind}: down in {fell} of {STEPS} steps, rates within {error:.0e} of by hand")


@both
def test_a_tensor_rate(build: Any) -> None:
    """Each group has one of its own; filling it takes effect, loading fills it, and nothing detaches it."""
    rate = torch.tensor(0.1)
    model = network()
    optimizer = build(model.named_parameters(), lr=rate)
    held = [group["lr"] for group in optimizer.param_groups]
    assert len({id(tensor) for tensor in [rate, *held]}) == 3
    saved = copy.deepcopy(optimizer.state_dict())
    before = digest(model.state_dict())
    held[0].fill_(0.5)
    assert [float(rate), float(held[1])] == [float(torch.tensor(0.1))] * 2
    for tensor in held:
        tensor.fill_(0.0)
    advance(model, optimizer, 0, 1)
    assert digest(model.state_dict()) == before
    optimizer.load_state_dict(saved)
    assert [float(tensor) for tensor in held] == [float(rate)] * 2
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, held, strict=True))
    advance(model, optimizer, 0, 1)
    assert digest(model.state_dict()) != before
    optimizer.add_param_group({"params": [("late", Parameter(torch.ones(3)))]})
    assert torch.equal(optimizer.param_groups[-1]["lr"], rate)


@both
def test_closure(build: Any) -> None:
    model = network()
    optimizer = build(model.named_parameters(), lr=0.05)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        for _ in range(5):
            losses.append(float(optimizer.step(closure).detach()))
            assert not torch.is_grad_enabled()
    assert losses == sorted(losses, reverse=True)
    assert optimizer.step(None) is None


@both
@pytest.mark.parametrize("other", ["none", "zero", "empty", "frozen"])
@pytest.mark.parametrize("shape", [(5, 3), (7,)])
def test_idle_parameters_do_not_disturb(build: Any, shape: tuple[int, ...], other: str) -> None:
    ends = []
    for crowded in (False, True):
        params, slopes = lines()
        idle = Parameter(torch.ones(0, *shape[1:]) if other == "empty" else torch.ones(shape), other != "frozen")
        extra = [("idle", idle)] if crowded else []
        optimizer = build([*extra, *params.items()], lr=0.1, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            total = descend(params, slopes)
            if crowded and other in ("zero", "empty"):
                total = total + 0 * idle.sum()
            total.backward()
            optimizer.step()
        assert bool((idle == 1).all())
        ends.append(digest(params))
    assert ends[0] == ends[1]


OPTIONS: dict[str, Any] = {
    "lr": 0.5,
    "weight_decay": 0.5,
    "momentum": 0.5,
    "nesterov": False,
    "betas": (0.5, 0.75),
    "eps": 0.5,
}
OF_ADAMW = {"betas": "adamw_betas", "eps": "adamw_eps"}


@both
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_a_group(build: Any, option: str) -> None:
    """An option of a group does what the same default does, and to that group only."""
    name = "b" if option in OF_ADAMW else "w"
    ends = []
    for where in ("nowhere", "group", "default"):
        params, slopes = lines()
        groups = [{"params": [pair]} for pair in params.items()]
        groups["wb".index(name)].update({option: OPTIONS[option]} if where == "group" else {})
        default = {OF_ADAMW.get(option, option): OPTIONS[option]} if where == "default" else {}
        optimizer = build(groups, **{"lr": 0.1, **default})
        for step in range(3):
            optimizer.zero_grad()
            descend(params, {key: slope + step for key, slope in slopes.items()}).backward()
            optimizer.step()
        ends.append({key: digest(p) for key, p in params.items()})
    assert ends[1][name] == ends[2][name] != ends[0][name]
    other = "b" if name == "w" else "w"
    assert ends[1][other] == ends[0][other]


@pytest.mark.fault("F20")
@both
def test_group_added_in_mid_run(build: Any, figure: Figure) -> None:
    """Neither the old nor the new parameters notice each other."""
    steps, ends = 6, []
    for added_at in (0, 3):
        old, slopes = lines()
        optimizer = build(old.items(), lr=0.1)
        alone: Any = None
        for step in range(steps):
            if step == added_at:
                new, _ = lines()
                groups = [{"params": [(f"new.{key}", p)], "weight_decay": 0.5} for key, p in new.items()]
                for group in groups if added_at else []:
                    optimizer.add_param_group(group)
                alone = optimizer if added_at else build(groups, lr=0.1)
            losses = [descend(old, slopes)] + ([descend(new, slopes)] if added_at <= step < added_at + 3 else [])
            for each in {id(optimizer): optimizer, id(alone): alone}.values():
                if each is not None:
                    each.zero_grad()
            torch.stack(losses).sum().backward()
            for each in {id(optimizer): optimizer, id(alone): alone}.values():
                if each is optimizer or (each is not None and added_at <= step < added_at + 3):
                    each.step()
        ends.append((digest(old), digest(new)))
    equal = sum(one == other for one, other in zip(*ends, strict=True))
    assert equal == 2
    figure(f"{build.__name__}: added after 3 of {steps} steps: {equal} of 2 sets of parameters as in optimizers apart")


@both
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(build: Any, overflow: bool) -> None:
    params, slopes = lines()
    optimizer = build(params.items(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(descend(params, slopes) * (torch.inf if overflow else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    expected, _ = lines()
    if not overflow:
        plain = build(expected.items(), lr=0.1)
        descend(expected, slopes).backward()
        plain.step()
    assert digest(params) == digest(expected)
    assert scaler.get_scale() == (2.0 if overflow else 4.0)
