"""Learning-rate schedules and param groups under DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.ds.engines import ADAMW_LR, LR, PARAMS, advance, build, config, weights
from tests.ds.session import attempt
from tests.ranks import RankPool

STEPS = 6
Share = Callable[[int], float]


def decay(step: int) -> float:
    """Share of the peak rate at an update."""
    return 0.5**step


def warm(step: int) -> float:
    """WarmupLR's share of the way up over four steps; it takes its first two steps at the lowest rate."""
    return min(1.0, max(0, step - 1) / 4)


def warm_decay(step: int) -> float:
    done = max(0, step - 1)
    return done / 2 if done < 2 else max(0.0, (6 - done) / 4)


def warm_cosine(step: int) -> float:
    done = max(0, step - 1)
    if done < 2:
        return done / 2
    cosine = 0.5 * (1 + math.cos(math.pi * (done - 2 + 1) / 4))
    return 0.0001 + (1 - 0.0001) * cosine


LINEAR = {"warmup_num_steps": 2, "warmup_type": "linear"}
# (JSON scheduler, lowest rate, highest rate or None for each group's own, share of the way up)
JSON: dict[str, tuple[dict[str, Any], float, float | None, Share]] = {
    "WarmupLR": (
        {"type": "WarmupLR", "params": {**LINEAR, "warmup_num_steps": 4, "warmup_min_lr": 0.001}},
        0.001,
        None,
        warm,
    ),
    "WarmupDecayLR": (
        {"type": "WarmupDecayLR", "params": {**LINEAR, "total_num_steps": 6, "warmup_max_lr": 0.04}},
        0.0,
        0.04,
        warm_decay,
    ),
    "WarmupCosineLR": (
        {"type": "WarmupCosineLR", "params": {**LINEAR, "total_num_steps": 6}},
        0.0,
        None,
        warm_cosine,
    ),
    "torch": ({"type": "ExponentialLR", "params": {"gamma": 0.5}}, 0.0, None, decay),
}


def rates(rank: int, world: int, group: Any, settings: Any, client: str) -> list[tuple[dict[str, float], bool]]:
    """Per step the rate of each kind, and whether any parameter moved."""
    arguments = {"lr_scheduler": lambda optimizer: LambdaLR(optimizer, decay)} if client == "callable" else {}
    engine = build(settings, 1, **arguments)
    own = LambdaLR(engine.optimizer, decay) if client == "own" else None
    seen = []
    for step in range(STEPS):
        before = weights(engine)
        lrs = {group["kind"]: group["lr"] for group in engine.optimizer.param_groups}
        advance(engine, step, step + 1)
        if own is not None:
            own.step()
        seen.append((lrs, any(not torch.equal(before[name], p) for name, p in engine.named.items())))
    return seen


def check(ranks: list[list[tuple[dict[str, float], bool]]], low: float, high: float | None, share: Share) -> None:
    for step, (lrs, moved) in enumerate(ranks[0]):
        for kind, peak in {"muon": LR, "adamw": ADAMW_LR}.items():
            want = low + ((high or peak) - low) * share(step)
            assert lrs[kind] == pytest.approx(want, rel=1e-9, abs=1e-12), (step, kind)
        assert moved == (lrs["muon"] > 0), step
    assert ranks[1] == ranks[0]


@pytest.mark.parametrize("name", JSON)
def test_schedulers_of_the_configuration(ds2: RankPool, name: str) -> None:
    scheduler, low, high, share = JSON[name]
    check(ds2.run(2, rates, config(scheduler=scheduler), ""), low, high, share)


@pytest.mark.parametrize("client", ["callable", "own"])
def test_client_schedulers(ds2: RankPool, client: str) -> None:
    """A callable given to deepspeed.initialize, and a scheduler that the user's loop steps."""
    check(ds2.run(2, rates, config(), client), 0.0, None, decay)


def test_the_schedule_waits_for_the_boundary(ds2: RankPool) -> None:
    """The engine steps once in two micro-batches, and the scheduler with it."""
    settings = config(gradient_accumulation_steps=2, scheduler=JSON["torch"][0])
    check(ds2.run(2, rates, settings, ""), 0.0, None, decay)


def client_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups as a user makes them; DeepSpeed needs the names when it splits off the experts."""
    embed, hidden = model.embed.weight, model.hidden.weight  # type: ignore[union-attr]
    rest = [p for p in model.parameters() if p is not embed and p is not hidden]
    return [
        {"params": [embed], "name": "frozen", "lr": 0.0},
        {"params": [hidden], "name": "odd", "lr": 0.004, "weight_decay": 0.0, "kind": "adamw", "betas": [0.5, 0.6]},
        {"params": rest, "name": "rest", "lr": 0.03, "momentum": 0.5},
    ]


def grouped(rank: int, world: int, group: Any, ep: int) -> dict[str, dict[str, Any]]:
    """Settings by parameter, and whether it moved."""
    engine = build(config(), ep, groups=client_groups)
    before = weights(engine)
    advance(engine, 0, 1)
    keys = ("kind", "lr", "weight_decay", "momentum", "betas")
    settings = {
        id(p): {key: group[key] for key in keys} for group in engine.optimizer.param_groups for p in group["params"]
    }
    return {name: {**settings[id(p)], "moved": not torch.equal(before[name], p)} for name, p in engine.named.items()}


@pytest.mark.parametrize("ep", [1, 2])
def test_client_groups_keep_their_settings(ds2: RankPool, ep: int) -> None:
    seen = ds2.run(2, grouped, ep)
    table = {**seen[0], **seen[1]}
    odd = {"kind": "adamw", "lr": 0.004, "weight_decay": 0.0, "momentum": 0.95, "moved": True}
    rest = {"lr": 0.03, "weight_decay": PARAMS["weight_decay"], "momentum": 0.5, "moved": True}
    embed, hidden = table.pop("embed.weight"), table.pop("hidden.weight")
    assert list(embed.pop("betas")) == [0.9, 0.95]
    assert embed == {**odd, "lr": 0.0, "weight_decay": PARAMS["weight_decay"], "moved": False}
    assert list(hidden.pop("betas")) == [0.5, 0.6]
    assert hidden == odd
    for name, found in table.items():
        assert {key: found[key] for key in rest} == rest, name
        assert found["kind"] == ("adamw" if name in ("head.weight", "hidden.bias") else "muon")


def bad_rate(rank: int, world: int, group: Any) -> Any:
    """Let a scheduler write an illegal rate."""
    engine = build(config(), None, lr_scheduler=lambda o: LambdaLR(o, lambda step: 1.0 if step < 1 else -1.0))
    advance(engine, 0, 1)
    before = weights(engine)
    error = attempt(lambda: advance(engine, 1, 2))
    return error, all(torch.equal(before[name], p) for name, p in engine.named.items())


def test_an_illegal_rate_is_refused_before_anything_is_written(ds2: RankPool) -> None:
    for error, unchanged in ds2.run(2, bad_rate):
        assert "ConfigError" in error[0]
        assert '"lr" = -0.01' in error[1] or '"lr" = -0.02' in error[1]
        assert unchanged
