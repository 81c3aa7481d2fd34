"""Parameters without gradients: idle experts on one rank or on all, frozen layers. None counts as zero everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

import distmuon
from tests.distributed import placed
from tests.distributed.placed import Job
from tests.distributed.scenario import advance, digest, leaves
from tests.ranks import run_threads

Figure = Callable[[str], None]
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "embed": ((20, 6), "adamw"),
    "dense": ((12, 8), "muon"),
    "experts.0": ((8, 12), "muon"),
    "experts.1": ((8, 12), "muon"),
    "experts.stack": ((3, 6, 10), "muon"),
    "norm": ((8,), "adamw"),
}
IDLE = ("experts.1", "experts.stack", "norm")
FROZEN = ("experts.0", "embed")
CASES = [(p, w, n) for p in ("balanced", "flat", "expert groups") for w in ("one rank", "all ranks") for n in (1, 5)]
CASES += [("balanced", "one rank", 100), ("flat", "all ranks", 100), ("expert groups", "one rank", 100)]
AROUND = 2
"""Steps with all gradients before and after those without."""


def layout(opt: Any) -> list[str]:
    return [path for path, _ in leaves(opt.state_dict())]


def finite(params: dict[str, Parameter], opt: Any) -> bool:
    tensors = [leaf for _, leaf in leaves((params, opt.state_dict())) if isinstance(leaf, Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def train(rank: int, world: int, job: Job, steps: int, where: str, fill: bool) -> dict[str, Any]:
    """Idle parameters have no gradient, or with ``fill`` one of zeros, for ``steps`` steps on one rank or on all."""
    params, group = placed.parameters(job), None
    if job.experts:
        halves = [dist.new_group([first, first + 2]) for first in (0, 1)]
        group = halves[rank % 2]
    opt = placed.optimizer(params, job, **({"expert_groups": {"ep": group}} if group else {}))
    before, digests = layout(opt), []
    for step in range(steps + 2 * AROUND):
        grads: dict[str, Any] = placed.gradients(job, step, 0, rank)
        if AROUND <= step < AROUND + steps and (where == "all ranks" or rank == 0):
            for name in IDLE:
                grads[name] = torch.zeros_like(grads[name]) if fill else None
        advance(params, opt, [grads])
        opt.step()
        opt.zero_grad()
        digests.append(digest(params))
    return {"digests": digests, "finite": finite(params, opt), "keys": before, "same": layout(opt) == before}


@pytest.mark.fault("F13")
@pytest.mark.parametrize(("policy", "where", "steps"), CASES)
def test_idle_experts(policy: str, where: str, steps: int, figure: Figure) -> None:
    groups = policy == "expert groups"
    world, chosen = (4, "balanced") if groups else (3, policy)
    job = Job(
        SHAPES, chosen, clip=1.0, bucket_mb=0.002, experts=tuple(n for n in SHAPES if "experts" in n) if groups else ()
    )
    start = time.monotonic()
    missing = run_threads(world, train, job, steps, where, False)
    seconds = time.monotonic() - start
    zeros = run_threads(world, train, job, steps, where, True)
    equal = sum(a == b for a, b in zip(missing[0]["digests"], zeros[0]["digests"], strict=True))
    keys = len({tuple(run["keys"]) for run in missing})
    figure(
        f"{policy}, idle for {steps} steps on {where} of {world}: {seconds:.2f} s, {equal} of {steps + 2 * AROUND} "
        f"steps equal zero gradients bit for bit, {keys} set of state keys"
    )
    assert all(run["finite"] and run["same"] for run in missing)
    for run, other in zip(missing, zeros, strict=True):
        assert run["digests"] == other["digests"]
    assert len(set(missing[0]["digests"])) == steps + 2 * AROUND
    assert keys == 1
    # Replicas are the ranks of an expert group, or all.
    assert len({tuple(run["digests"]) for run in missing}) == (2 if groups else 1)


@pytest.mark.fault("F13")
@pytest.mark.parametrize("world", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_parameters(dtype: str, world: int, figure: Figure) -> None:
    """They keep their bits and take no state; the others train as if they were not there."""
    job = Job(SHAPES, dtype=dtype)
    rest = Job({n: shape for n, shape in SHAPES.items() if n not in FROZEN}, dtype=dtype)

    def body(rank: int, ranks: int, with_frozen: bool) -> tuple[dict[str, str], list[str]]:
        params = placed.parameters(job)
        for name in FROZEN:
            params[name].requires_grad_(False)
        trained = {name: p for name, p in params.items() if name not in FROZEN}
        given = params if with_frozen else trained
        if world:
            opt = placed.optimizer(given, job)
        else:
            opt = distmuon.Muon(placed.groups(given, job), **placed.settings(job))
        for step in range(5):
            advance(trained, opt, [placed.gradients(rest, step, 0, rank)])
            opt.step()
            opt.zero_grad()
        assert finite(params, opt)
        return {name: digest(p) for name, p in params.items()}, layout(opt)

    if world:
        runs, without = run_threads(world, body, True), run_threads(world, body, False)
    else:
        runs, without = [body(0, 1, True)], [body(0, 1, False)]
    start = {name: digest(p) for name, p in placed.parameters(job).items()}
    kept = sum(run[0][name] == start[name] for run in runs for name in FROZEN)
    figure(f"world {world}, {dtype}: {kept} of {len(runs) * len(FROZEN)} frozen parameters kept their bits")
    assert kept == len(runs) * len(FROZEN)
    assert [run[0] for run in runs] == [run[0] for run in without]
    assert all(run[1] == runs[0][1] for run in runs)


@pytest.mark.fault("F13", "F14")
@pytest.mark.parametrize("make", [distmuon.Muon, distmuon.DistMuon])
@pytest.mark.parametrize("preset", ["papers", "opt5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_momentum_that_dies_away(dtype: str, preset: str, make: Any, figure: Figure) -> None:
    """A parameter that stays without gradients has a momentum that passes through all subnormals on its way to zero."""
    w = Parameter(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)))
    ns = distmuon.NewtonSchulz.model_validate({"dtype": dtype, "preset": preset})
    opt = make([("w", w)], lr=0.01, weight_decay=0.0, momentum=0.5, ns=ns)
    w.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    longest, steps, moved = 0.0, 0, 1.0
    while moved and steps < 200:
        before = w.detach().clone()
        opt.step()
        opt.zero_grad()
        moved, steps = float((w.detach() - before).norm()), steps + 1
        longest = max(longest, moved)
        if not w.isfinite().all():
            break
    figure(f"{make.__name__}, {preset}, {dtype}: idle for {steps} steps, the last of them moved it by {moved:g}")
    assert bool(w.isfinite().all())
    assert longest < 1.1 * 0.01 * 0.2 * (16 * 24) ** 0.5
    assert moved == 0
