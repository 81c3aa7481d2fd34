"""Experts that no token reaches, through DeepSpeed's mixture of experts: zero gradients there, or none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ds import engines
from tests.ranks import RankPool


def without_tokens(rank: int, world: int, group: Any, ep: int, where: str) -> dict[str, Any]:
    """Five steps; a frozen gate of zeros sends every token to experts 0 and 1."""
    model = engines.network(ep)
    gate = model.moe.deepspeed_moe.gate.wg.weight.requires_grad_(False)
    engine = engines.build(engines.config(params={"weight_decay": 0.0}), ep, model=model)
    if where == "all ranks" or rank == 0:
        gate.zero_()
    before = engines.weights(engine)
    engines.advance(engine, 0, 5)
    after = engines.weights(engine)
    moved = {name: not torch.equal(before[name], after[name]) for name in before if "experts" in name}
    state = engine.optimizer.state_dict()["state"]
    return {
        "moved": moved,
        "keys": sorted({key for entry in state.values() for key in entry}),
        "finite": all(bool(value.isfinite().all()) for value in after.values()),
    }


@pytest.mark.fault("F13")
@pytest.mark.parametrize("where", ["one rank", "all ranks"])
@pytest.mark.parametrize("ep", [1, 2])
def test_deepspeed_experts_without_tokens(ds2: RankPool, ep: int, where: str, figure: Callable[[str], None]) -> None:
    """Experts that get no token anywhere stay where they are; those that another rank uses are trained on both."""
    start = time.monotonic()
    ranks = ds2.run(2, without_tokens, ep, where)
    moved = {name: value for seen in ranks for name, value in seen["moved"].items()}
    figure(
        f"DeepSpeed, ep_size {ep}, no token on {where}, 5 steps: {sum(moved.values())} of {len(moved)} expert "
        f"matrices moved, {time.monotonic() - start:.1f} s"
    )
    assert all(seen["finite"] for seen in ranks)
    assert ranks[0]["keys"] == ranks[1]["keys"]
    for name, value in moved.items():
        idle = "experts.2." in name or "experts.3." in name
        assert value == (where == "one rank" or not idle), name
