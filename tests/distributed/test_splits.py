"""A fused parameter with splits is the separate matrices that it consists of, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import distmuon
from tests.distributed.placed import WAYS, Job, gradients, groups, optimizer, parameters, settings, threaded
from tests.distributed.scenario import backward
from tests.oracle import relative
from tests.ranks import run_threads

Cut = dict[str, list[tuple[str, int]]]

FUSED: dict[str, tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, Any]]] = {
    "qkv": ({"qkv": ((24, 8), "muon"), "gain": ((40,), "adamw")}, {"qkv": 3}),
    "grouped queries": ({"w": ((14, 10), "muon"), "qkv": ((18, 10), "muon")}, {"qkv": [10, 4, 4]}),
    "heads": ({"q": ((16, 12), "muon"), "table": ((30, 4), "adamw")}, {"q": 8}),
    "experts": ({"gate_up": ((3, 12, 6), "muon"), "gain": ((7,), "adamw")}, {"gate_up": 2}),
    "uneven experts": ({"gate_up": ((2, 12, 6), "muon"), "down": ((2, 6, 8), "muon")}, {"gate_up": [9, 2, 1]}),
}


def rows(job: Job, name: str) -> list[int]:
    split, size = job.splits.get(name), job.shapes[name][0][-2:-1]
    return [size[0] // split] * split if isinstance(split, int) else list(split or size)


def separate(job: Job, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The blocks of rows of every fused tensor, as tensors of their own."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in job.splits:
            found[name] = tensor
            continue
        for i, block in enumerate(torch.split(tensor, rows(job, name), dim=-2)):
            found[f"{name}.{i}"] = block.clone()
    return found


def unfused(job: Job) -> Job:
    """The same model with a parameter per block."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, (shape, kind) in job.shapes.items():
        if name in job.splits:
            sizes = enumerate(rows(job, name))
            shapes |= {f"{name}.{i}": ((*shape[:-2], size, shape[-1]), kind) for i, size in sizes}
        else:
            shapes[name] = (shape, kind)
    return replace(job, shapes=shapes, splits={})


def both(rank: int, world: int, job: Job, twin: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train the fused model and the separate one alike; returns the blocks of both."""
    fused = parameters(job)
    parts = {name: Parameter(value.detach()) for name, value in separate(job, dict(fused)).items()}
    models = [(fused, job), (parts, unfused(job))]
    if twin:
        opts: list[Any] = [distmuon.Muon(groups(params, own), **settings(own)) for params, own in models]
    else:
        opts = [optimizer(params, own) for params, own in models]
    for number in range(job.steps):
        grads = gradients(job, number, 0, rank)
        for (params, _), opt, given in zip(models, opts, (grads, separate(job, grads)), strict=True):
            backward(params, given)
            opt.step()
            opt.zero_grad()
    return separate(job, {name: p.detach() for name, p in fused.items()}), {n: p.detach() for n, p in parts.items()}


def assert_equal(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("which", FUSED)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_distmuon(world: int, way: tuple[str, str], which: str) -> None:
    shapes, splits = FUSED[which]
    ns = "bfloat16" if world % 2 == 0 else "float32"
    dtype = "bfloat16" if world == 3 else "float32"
    job = Job(shapes, *way, ns={"dtype": ns}, splits=splits, clip=1.0, dtype=dtype)
    for found, want in run_threads(world, both, job, False):
        assert_equal(found, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", FUSED)
def test_muon(which: str, dtype: str) -> None:
    shapes, splits = FUSED[which]
    job = Job(shapes, ns={"dtype": "bfloat16"}, splits=splits, clip=1.0, dtype=dtype)
    assert_equal(*both(0, 1, job, True))


@pytest.mark.parametrize("which", FUSED)
def test_muon_is_distmuon(which: str) -> None:
    shapes, splits = FUSED[which]
    job = Job(shapes, splits=splits)
    assert_equal(both(0, 1, job, True)[0], both(0, 1, job, False)[0])


@pytest.mark.parametrize("which", FUSED)
@pytest.mark.parametrize("world", [3, 4])
def test_teams(world: int, which: str) -> None:
    """Slices are those of blocks, never of a whole fused parameter."""
    shapes, splits = FUSED[which]
    job = Job(shapes, policy="team", splits=splits)
    want = run_threads(world, both, replace(job, policy="balanced"), False)[0][1]
    for found, _ in run_threads(world, both, job, False):
        assert max(relative(found[name], want[name]) for name in want) < 1e-5


def test_a_split_matters() -> None:
    """Orthogonalized as one matrix, or as three, is not the same."""
    shapes, splits = FUSED["qkv"]
    job = Job(shapes, steps=1)
    one, three = (run_threads(2, threaded, replace(job, splits=own))[0] for own in ({}, splits))
    assert one["params"]["gain"] == three["params"]["gain"]
    assert one["params"]["qkv"] != three["params"]["qkv"]
