"""Buffers of collectives under way: nobody frees or reuses one too early, whatever else takes memory meanwhile."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.overlapped import Net, backward, make
from tests.distributed.scenario import digest
from tests.ranks import RankPool

WAYS = [("balanced", "scatter"), ("balanced", "owner"), ("flat", "auto"), ("team", "auto")]
BUCKET_MB = 0.0005
SIZES = (1, 7, 16, 64, 100, 256, 500, 1024, 5000, 40_000)
"""Elements, around those of the model's parameters, shards and buckets, up to what the allocator maps anew."""


def churn(step: int) -> None:
    """Take what memory was freed since, fill it with NaN, and free it in another order."""
    taken = [torch.empty(size, dtype=dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16) * 4]
    for tensor in taken:
        tensor.fill_(torch.nan)
    while taken:
        taken.pop(step % len(taken))


class Seen:
    """Hash of the weights that every module's forward uses."""

    def __init__(self, model: nn.Module) -> None:
        self.sha = hashlib.sha256()
        for module in model.modules():
            module.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, given: Any) -> None:
        for p in module.parameters(recurse=False):
            self.sha.update(p.detach().numpy().tobytes())


def train(
    rank: int, world: int, group: Any, way: tuple[str, str], overlap: bool, disturb: bool, steps: int
) -> tuple[list[str], str]:
    """After every step, what the forward saw so far; and parameters at the end."""
    model, opt = make(group, way, overlap, BUCKET_MB)
    seen, digests = Seen(model), []
    for step in range(steps):
        backward(model, step, rank)
        for _ in range(disturb):
            churn(step)
        opt.step()
        for _ in range(disturb):
            churn(step)
        opt.zero_grad()
        for _ in range(disturb):
            churn(step)
        digests.append(seen.sha.hexdigest())
    opt.finish_gathers()
    return digests, digest(model.state_dict())


def check(
    pool: RankPool, world: int, way: tuple[str, str], overlap: bool, steps: int, figure: Callable[[str], None]
) -> None:
    quiet = undisturbed(pool, world, "team" if way[0] == "team" else "whole", steps)
    start = time.monotonic()
    disturbed = pool.run(world, train, way, overlap, True, steps, timeout=550.0)
    equal = sum(len({run[0][step] for run in (*quiet, *disturbed)}) == 1 for step in range(steps))
    figure(
        f"{way[0]}, {way[1]}, overlap {'on' if overlap else 'off'}: after {equal} of {steps} steps all {world} gloo "
        f"ranks bit-equal, and to an undisturbed run; {time.monotonic() - start:.1f} s"
    )
    assert equal == steps
    assert len({run[1] for run in (*quiet, *disturbed)}) == 1
    assert len(set(quiet[0][0])) == steps


@functools.cache
def undisturbed(pool: RankPool, world: int, matrices: str, steps: int) -> list[tuple[list[str], str]]:
    """Policies that keep matrices whole give the same bits."""
    way = WAYS[-1] if matrices == "team" else WAYS[0]
    return pool.run(world, train, way, False, False, steps, timeout=550.0)


@pytest.mark.fault("F21")
@pytest.mark.parametrize(("way", "overlap"), [(WAYS[0], False), (WAYS[1], True), (WAYS[2], True)], ids=str)
def test_allocator_churn(pool: RankPool, way: tuple[str, str], overlap: bool, figure: Callable[[str], None]) -> None:
    check(pool, 2, way, overlap, 200, figure)


@pytest.mark.fault("F21")
@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("world", "way", "overlap"), [*((2, way, overlap) for way in WAYS for overlap in (False, True)), (4, WAYS[1], True)]
)
def test_long_allocator_churn(
    pool: RankPool, way: tuple[str, str], overlap: bool, world: int, figure: Callable[[str], None]
) -> None:
    check(pool, world, way, overlap, 2000, figure)


def test_the_model_has_parts_that_wait() -> None:
    """What makes the test able to fail: several buckets, and a layer that no forward waits for."""
    _, opt = make(bucket_mb=BUCKET_MB)
    assert sum(len(plan.buckets) for plan in opt.plans) > 3
    assert any("spare" in name for name, _ in Net().named_parameters())
