"""Muon is DistMuon at one rank, bit for bit, and both are right where one of them could slip."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon import DistMuon, Muon, NewtonSchulz
from distmuon.errors import ConfigError
from tests.oracle import OracleMuon, Settings, relative

SHAPES: dict[str, tuple[int, ...]] = {
    "table": (24, 6),
    "tall": (32, 8),
    "wide": (8, 40),
    "odd": (5, 7),
    "row": (1, 12),
    "experts": (3, 8, 20),
    "gain": (9,),
    "scalar": (),
}
BUILDS: list[Any] = [Muon, DistMuon]


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {n: nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(dtype)) for n, s in SHAPES.items()}


def groups(params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    muon = {n: p for n, p in params.items() if p.ndim > 1 and n != "table"}
    rest = {n: p for n, p in params.items() if n not in muon}
    return [{"params": list(muon.items()), "kind": "muon"}, {"params": list(rest.items()), "kind": "adamw"}]


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def give(params: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    """Backward with exactly these gradients."""
    terms = [(params[name] * grad.to(params[name].dtype)).sum().float() for name, grad in grads.items()]
    torch.autograd.backward(torch.stack(terms).sum())


def train(build: Any, dtype: torch.dtype, steps: int = 4, **settings: Any) -> dict[str, nn.Parameter]:
    params = parameters(dtype)
    optimizer = build(groups(params), **{"lr": 0.05, "adamw_lr": 0.02, **settings})
    for step in range(steps):
        give(params, gradients(step))
        optimizer.step()
        optimizer.zero_grad()
    return params


def same(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clipped": {"max_grad_norm": 0.5},
    "clipped above": {"max_grad_norm": 1e6},
    "heavy ball": {"nesterov": False, "momentum": 0.5},
    "no momentum": {"momentum": 0.0},
    "decay": {"weight_decay": 0.5, "adamw_weight_decay": 0.0},
    "adamw": {"adamw_betas": (0.5, 0.75), "adamw_eps": 0.1},
    "one rate": {"adamw_lr": None},
    "float32 iteration": {"ns": NewtonSchulz(dtype="float32", steps=3)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bit_for_bit(variant: str, dtype: torch.dtype) -> None:
    assert same(train(Muon, dtype, **VARIANTS[variant]), train(DistMuon, dtype, **VARIANTS[variant]))


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_every_variant_shows(variant: str) -> None:
    changed = same(train(Muon, torch.float32, **VARIANTS[variant]), train(Muon, torch.float32))
    assert changed == (variant == "clipped above")


@pytest.mark.parametrize("settings", [{}, {"bucket_mb": 0.0005}, {"policy": "flat", "bucket_mb": 0.0005}])
def test_buckets_and_policy_do_not_matter_at_one_rank(settings: dict[str, Any]) -> None:
    assert same(train(Muon, torch.bfloat16), train(DistMuon, torch.bfloat16, **settings))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("build", BUILDS)
def test_against_the_reference(build: Any, clip: float | None) -> None:
    start = parameters()
    kinds = {name: group["kind"] for group in groups(start) for name, _ in group["params"]}
    rates = {"muon": 0.05, "adamw": 0.02}
    reference = OracleMuon(
        {name: p.detach() for name, p in start.items()},
        {name: Settings(kind=kind, lr=rates[kind]) for name, kind in kinds.items()},
        max_grad_norm=clip,
    )
    for step in range(4):
        reference.step([gradients(step)])
    found = train(build, torch.float32, max_grad_norm=clip, ns=NewtonSchulz(dtype="float32"))
    for name, p in found.items():
        moved = p.detach() - start[name].detach()
        assert relative(moved, reference.masters[name] - start[name].detach()) < 1e-5, name


@pytest.mark.fault("F13")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_missing_gradients_count_as_zero(dtype: torch.dtype, figure: Callable[[str], None]) -> None:
    found = []
    for build in BUILDS:
        params = parameters(dtype)
        optimizer = build(groups(params), lr=0.05)
        for step, names in enumerate((list(SHAPES), ["odd", "gain"], list(SHAPES)[::2])):
            give(params, {name: grad for name, grad in gradients(step).items() if name in names})
            optimizer.step()
            optimizer.zero_grad()
        found.append(params)
    equal = sum(torch.equal(found[0][name], found[1][name]) for name in SHAPES)
    figure(f"{dtype}: {equal} of {len(SHAPES)} parameters of Muon and DistMuon equal where gradients are missing")
    assert same(*found)
    assert not torch.equal(found[0]["tall"], train(Muon, dtype, steps=1, adamw_lr=None)["tall"])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_skips_the_step(build: Any, bad: float) -> None:
    params, undisturbed = parameters(), train(build, torch.float32, steps=2, adamw_lr=None)
    optimizer = build(groups(params), lr=0.05)
    for grads in (gradients(0), gradients(7) | {"gain": torch.full((9,), bad)}, gradients(1)):
        give(params, grads)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    assert same(params, undisturbed)


@pytest.mark.parametrize("size", [1e-25, 1e15, 1e25])
def test_gradients_of_any_finite_size(size: float) -> None:
    """Squares leave the range of float32 long before the gradients do."""
    found, skipped = [], []
    for build in BUILDS:
        params = parameters()
        optimizer = build(groups(params), lr=0.05, max_grad_norm=1.0)
        give(params, {name: grad * size for name, grad in gradients(0).items()})
        optimizer.step()
        found.append(params)
        skipped.append(optimizer.skipped_steps)
    assert skipped == [0, 0]
    assert same(*found)


def test_frozen_parameters_stay() -> None:
    found = []
    for build in BUILDS:
        params = parameters()
        params["odd"].requires_grad_(False)
        optimizer = build(groups(params), lr=0.05)
        give(params, {name: grad for name, grad in gradients(0).items() if name != "odd"})
        optimizer.step()
        found.append(params)
    assert same(*found)
    assert torch.equal(found[0]["odd"], parameters()["odd"])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 4), (0,)])
@pytest.mark.parametrize("build", BUILDS)
def test_empty_parameters(build: Any, shape: tuple[int, ...]) -> None:
    weight, empty = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(shape))
    optimizer = build([weight, empty], lr=0.05)
    torch.autograd.backward(weight.sum() + empty.sum())
    optimizer.step()
    assert bool((weight != 1).all())


@pytest.mark.parametrize("build", BUILDS)
def test_a_bf16_parameter_written_from_outside_is_the_truth(build: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = build(groups(params), lr=1e-6, adamw_lr=1e-6)
    for step in range(2):
        give(params, gradients(step))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            params["odd"].fill_(3.0)
    give(params, gradients(2))
    optimizer.step()
    assert torch.equal(params["odd"], torch.full((5, 7), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("build", BUILDS)
def test_small_bf16_steps_add_up_in_the_master_weights(build: Any) -> None:
    """One step is less than half a bf16 unit; forty of them must not vanish."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = build([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(40):
        torch.autograd.backward((weight * torch.eye(4, dtype=torch.bfloat16)).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert float(weight.detach().diagonal().max()) < 0.995


@pytest.mark.parametrize("build", BUILDS)
def test_closure(build: Any) -> None:
    params = parameters()
    optimizer = build(groups(params), lr=0.05, adamw_lr=0.02)

    def closure() -> str:
        assert torch.is_grad_enabled()
        give(params, gradients(0))
        return "the loss"

    assert optimizer.step(closure) == "the loss"
    assert same(params, train(build, torch.float32, steps=1))


def test_arguments_are_those_of_distmuon() -> None:
    ours, theirs = (inspect.signature(build).parameters for build in BUILDS)
    assert {n: p.default for n, p in ours.items()} == {n: theirs[n].default for n in ours}
    assert (
        not set(theirs)
        - set(ours)
        - {
            *("process_group", "policy", "reduce_dtype", "bucket_mb"),
            *("adamw_backend", "grad_accum_dtype", "expert_groups", "transport"),
        }
    )


def test_empty() -> None:
    with pytest.raises(ConfigError, match="params is empty"):
        Muon([])


def test_loaded_state_stays_float32() -> None:
    """torch would cast momentum and master weights to the 16-bit parameters' dtype."""
    runs = []
    for reload in (False, True):
        params = {name: nn.Parameter(p.detach().bfloat16()) for name, p in parameters().items()}
        optimizer = Muon(groups(params), lr=0.01)
        for step in range(4):
            if reload and step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = Muon(groups(params), lr=0.01)
                optimizer.load_state_dict(saved)
            give(params, {name: grad.bfloat16() for name, grad in gradients(step).items()})
            optimizer.step()
        runs.append([state for p in params.values() for state in optimizer.state[p].values()])
    for once, again in zip(*runs, strict=True):
        assert torch.equal(torch.as_tensor(once), torch.as_tensor(again))
        assert not isinstance(again, torch.Tensor) or again.dtype == torch.float32


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_float16_newton_schulz_of_any_size(build: Any, size: float) -> None:
    moved = []
    for dtype in ("float32", "float16"):
        params = {"weight": nn.Parameter(torch.zeros(4, 4))}
        optimizer = build([{"params": [params["weight"]], "kind": "muon"}], lr=1.0, ns=NewtonSchulz(dtype=dtype))
        give(params, {"weight": torch.eye(4) * size})
        optimizer.step()
        moved.append(params["weight"].detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=0.02, atol=0.002)
