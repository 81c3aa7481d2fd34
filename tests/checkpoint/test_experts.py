"""Expert parallelism: every rank saves its own experts under global names, and another number of ranks takes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmuon import checkpoint
from distmuon.errors import CheckpointError, DistMuonError
from tests.checkpoint.scene import Figure, Model, Shapes, Spec, Way, Whole, bits_differing, optimizer, whole
from tests.ranks import run_threads

EXPERTS = 4
SHARED: Shapes = {"dense": ((10, 6), "muon"), "norm": ((6,), "adamw"), "gate": ((4, 6), "muon")}


def local(ep: int, dtype: str) -> Spec:
    """The model of a rank that has its share of the experts."""
    shapes = dict(SHARED)
    for number in range(EXPERTS // ep):
        shapes |= {f"up{number}": ((8, 6), "muon"), f"bias{number}": ((8,), "adamw")}
    return Spec(shapes, dtype, experts=tuple(name for name in shapes if name not in SHARED))


def renamed(rank: int, ep: int) -> Callable[[str], str]:
    """Local to global names."""
    first = rank % ep * (EXPERTS // ep)
    return lambda name: re.sub(r"(up|bias)(\d+)", lambda found: f"{found[1]}{first + int(found[2])}", name)


def build(rank: int, world: int, ep: int, dtype: str, seed: int, policy: str) -> tuple[Spec, Model, Any]:
    """Weights are a function of the seed and the global name."""
    spec, rename, own = local(ep, dtype), renamed(rank, ep), None
    for first in range(ep):
        group = dist.new_group(list(range(first, world, ep)))
        own = group if rank % ep == first else own
    model = Model(spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            source = torch.Generator().manual_seed(seed + sum(rename(name).encode()))
            p.copy_(0.1 * torch.randn(p.shape, generator=source))
    return spec, model, optimizer(model, spec, Way(policy=policy), expert_groups={"ep": own})


def train(model: Model, opt: Any, spec: Spec, rank: int, ep: int, first: int, last: int) -> None:
    """An expert's gradient counts on as many ranks as have it, so that its mean is that of any other ep."""
    rename = renamed(rank, ep)
    for step in range(first, last):
        terms = []
        for name, p in model.w.items():
            source = torch.Generator().manual_seed(1000 * step + sum(rename(name).encode()))
            gradient = torch.randint(-8, 9, p.shape, generator=source) / 16 * (ep if name in spec.experts else 1)
            terms.append((p * gradient.to(p.dtype)).sum().float())
        torch.autograd.backward(torch.stack(terms).sum())
        opt.step()
        opt.zero_grad()


def write(rank: int, world: int, ep: int, dtype: str, policy: str, folder: Path) -> tuple[Whole, Whole]:
    spec, model, opt = build(rank, world, ep, dtype, 3, policy)
    train(model, opt, spec, rank, ep, 0, 3)
    saved = together(whole(model, opt, renamed(rank, ep)))
    checkpoint.save(folder, model, opt, step=3, rename=renamed(rank, ep))
    train(model, opt, spec, rank, ep, 3, 8)
    return saved, together(whole(model, opt, renamed(rank, ep)))


def read(rank: int, world: int, ep: int, dtype: str, policy: str, folder: Path) -> tuple[Whole, Whole]:
    spec, model, opt = build(rank, world, ep, dtype, 5, policy)
    train(model, opt, spec, rank, ep, 5, 6)
    names = {name: renamed(rank, ep)(name) for name in model.state_dict()}
    checkpoint.load(folder, model, opt, rename=names)
    loaded = together(whole(model, opt, renamed(rank, ep)))
    train(model, opt, spec, rank, ep, 3, 8)
    return loaded, together(whole(model, opt, renamed(rank, ep)))


def together(found: Whole) -> Whole:
    """Experts of all ranks; replicas must agree."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    merged: Whole = {}
    for one in ranks:
        shared = one.keys() & merged.keys()
        assert bits_differing({name: one[name] for name in shared}, {name: merged[name] for name in shared}) == 0
        merged |= one
    return merged


LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]


@pytest.mark.fault("F9")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("before", LAYOUTS, ids=str)
def test_experts_move_between_ranks(tmp_path: Path, before: tuple[int, int], dtype: str, figure: Figure) -> None:
    saved, straight = run_threads(before[0], write, before[1], dtype, "balanced", tmp_path)[0]
    assert {f"weight/w.up{number}" for number in range(EXPERTS)} <= saved.keys()
    differing = 0
    for world, ep in LAYOUTS:
        for loaded, later in run_threads(world, read, ep, dtype, "flat", tmp_path):
            differing += bits_differing(loaded, saved) + bits_differing(later, straight)
    figure(f"(ranks, expert parallelism) {before} -> each of {LAYOUTS}, {dtype}: {differing} bits differ")
    assert differing == 0


def clash(rank: int, world: int, folder: Path) -> tuple[str, bool]:
    """Save experts of different ranks under one name."""
    _, model, opt = build(rank, world, 2, "float32", 3, "balanced")
    try:
        checkpoint.save(folder, model, opt, step=1)
    except DistMuonError as error:
        return str(error), isinstance(error, CheckpointError) or "rename" in str(error)
    return "", False


def test_experts_of_the_same_name_are_refused(tmp_path: Path) -> None:
    """Without ``rename`` the experts of rank 1 would overwrite those of rank 0."""
    for message, named in run_threads(2, clash, tmp_path):
        assert named
        assert "up0" in message or "bias0" in message or "up1" in message or "bias1" in message
    assert not list(tmp_path.glob("step_????????"))
