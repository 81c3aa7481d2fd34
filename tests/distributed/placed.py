"""Training under a policy and a transport, on parameters that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import distmuon
from tests.distributed.scenario import advance, backward, digest

WAYS = [("balanced", "scatter"), ("balanced", "owner"), ("flat", "auto")]
"""Placements that keep to the same arithmetic."""


@dataclass(frozen=True)
class Job:
    """A run on random parameters; plain fields, so that it can travel to another process."""

    shapes: Mapping[str, tuple[tuple[int, ...], str]]
    policy: str = "balanced"
    transport: str = "auto"
    ns: Mapping[str, Any] = field(default_factory=lambda: {"dtype": "float32"})
    splits: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    reduce_dtype: str = "float32"
    grad_accum_dtype: str | None = None
    clip: float | None = None
    accumulation: int = 1
    bucket_mb: float = 0.0006
    steps: int = 2
    scale: float = 1.0
    zero: tuple[str, ...] = ()
    """Parameters whose gradients are zero."""
    experts: tuple[str, ...] = ()
    """Parameters of the expert group "ep"."""


def parameters(job: Job) -> dict[str, Parameter]:
    """The same on every rank."""
    source = torch.Generator().manual_seed(5)
    dtype = getattr(torch, job.dtype)
    return {n: Parameter((0.05 * torch.randn(s, generator=source)).to(dtype)) for n, (s, _) in job.shapes.items()}


def groups(params: Mapping[str, Parameter], job: Job) -> list[dict[str, Any]]:
    """A group per parameter, in the order of the model."""
    found = []
    for position, (name, p) in enumerate(params.items()):
        group = {"params": [(name, p)], "kind": job.shapes[name][1], "positions": [position]}
        group |= {"split": job.splits[name]} if name in job.splits else {}
        found.append({**group, "expert_group": "ep"} if name in job.experts else group)
    return found


def settings(job: Job) -> dict[str, Any]:
    """What Muon and DistMuon share."""
    ns = distmuon.NewtonSchulz.model_validate(dict(job.ns))
    return {"lr": 0.1, "adamw_lr": 0.02, "max_grad_norm": job.clip, "ns": ns}


def optimizer(params: Mapping[str, Parameter], job: Job, group: Any = None, **extra: Any) -> Any:
    """The optimizer under test."""
    placement: dict[str, Any] = {"policy": job.policy, "transport": job.transport, "bucket_mb": job.bucket_mb}
    placement |= {"reduce_dtype": getattr(torch, job.reduce_dtype), "process_group": group}
    if job.grad_accum_dtype is not None:
        placement["grad_accum_dtype"] = getattr(torch, job.grad_accum_dtype)
    return distmuon.DistMuon(groups(params, job), **settings(job), **placement, **extra)


def gradients(job: Job, step: int, micro: int, rank: int) -> dict[str, Any]:
    """Random gradients of one micro-batch, different on every rank."""
    source = torch.Generator().manual_seed(1000 * step + 10 * micro + rank + 3)
    found = {}
    for name, (shape, _) in job.shapes.items():
        drawn = torch.randn(shape, generator=source) * (0.0 if name in job.zero else job.scale)
        found[name] = drawn.to(getattr(torch, job.dtype))
    return found


def step(params: Mapping[str, Parameter], opt: Any, job: Job, number: int, rank: int) -> None:
    """One step on this rank's gradients."""
    advance(params, opt, [gradients(job, number, micro, rank) for micro in range(job.accumulation)])
    opt.step()
    opt.zero_grad()


def train(rank: int, world: int, group: Any, job: Job) -> dict[str, Any]:
    """Train; returns plain values."""
    params = parameters(job)
    opt = optimizer(params, job, group)
    digests = []
    for number in range(job.steps):
        step(params, opt, job, number, rank)
        digests.append(digest(params))
    matrices = [matrix for plan in opt.plans for matrix in plan.matrices]
    return {
        "digests": digests,
        "params": {name: p.detach().double().flatten().tolist() for name, p in params.items()},
        "slices": [matrix.slices for matrix in matrices if matrix.team],
        "cut": sum(matrix.cut for matrix in matrices),
        "transports": [plan.transport for plan in opt.plans],
        "even": [bucket.even for plan in opt.plans for bucket in plan.buckets],
        "skipped": opt.skipped_steps,
    }


def threaded(rank: int, world: int, job: Job) -> dict[str, Any]:
    """``train`` for threaded ranks."""
    return train(rank, world, None, job)


def total_update(job: Job, answer: Mapping[str, Any], names: list[str] | None = None) -> Tensor:
    """How far the parameters moved, as one float64 vector."""
    start = parameters(job)
    parts = [torch.tensor(answer["params"][n]).double() - start[n].detach().double().flatten() for n in names or start]
    return torch.cat(parts)


__all__ = ["Job", "advance", "backward", "digest", "gradients", "optimizer", "parameters", "settings", "step", "train"]
