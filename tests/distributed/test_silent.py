"""Silent failures known from other Muon implementations, each as a numbered test of a plain training loop.

Number 6, all shapes flattened by a ZeRO-3 wrapper so that nothing is routed to Muon, has no counterpart here.
"""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import distmuon
from tests.distributed.scenario import (
    MODEL,
    Case,
    Gradients,
    Run,
    advance,
    backward,
    digest,
    gradients,
    leaves,
    optimizer,
    parameters,
    plain,
    train,
)
from tests.oracle import polar, relative, rms
from tests.ranks import run_threads

Figure = Callable[[str], None]

MATRICES = [name for name, (_, kind) in MODEL.items() if kind == "muon"]
BAND = (0.66, 1.16)
"""Where five steps of the papers' triple leave singular values, 0.68 to 1.13, with bf16 noise."""


def matrices(run: Run, start: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    """Total update of every matrix."""
    return {
        name: (torch.tensor(run.params[name]) - torch.tensor(start[name])).reshape(MODEL[name][0]) for name in MATRICES
    }


def updates(world: int, case: Case, **extra: Any) -> dict[str, torch.Tensor]:
    """First update of every matrix, in units of the learning rate."""

    def body(rank: int, ranks: int) -> Run:
        params = parameters(case.torch_dtype)
        opt = optimizer(params, case, **extra)
        advance(params, opt, [gradients(case, 0, micro, rank, ranks) for micro in range(case.accumulation)])
        opt.step()
        return Run(plain(params))

    run = run_threads(world, body)[0]
    return {name: -u / case.lr for name, u in matrices(run, plain(parameters(case.torch_dtype))).items()}


@pytest.mark.fault("S1")
def test_01_clipping_does_not_shrink_the_update(figure: Figure) -> None:
    """Clipping scales raw gradients; the orthogonalized update keeps its length."""
    free, clipped = (updates(2, Case(clip=clip, weight_decay=0.0)) for clip in (None, 1.0))
    worst = max(abs(float(clipped[name].norm() / free[name].norm()) - 1) for name in MATRICES)
    figure(f"clipped at 1.0, |update| of {len(MATRICES)} matrices changes by at most {worst:.1e}")
    for name in MATRICES:
        assert relative(clipped[name], free[name]) < 1e-5, name
        assert float(clipped[name].norm() / free[name].norm()) == pytest.approx(1.0, rel=1e-6), name


@pytest.mark.fault("S2", "S9")
@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (3, 4)])
def test_02_09_every_matrix_is_orthogonalized(
    world: int, accumulation: int, policy: str, dtype: str, reduce_dtype: torch.dtype, figure: Figure
) -> None:
    """No combination of dtypes, accumulation and placement falls back to SGD."""
    case = Case(policy=policy, dtype=dtype, accumulation=accumulation, ns="bfloat16", lr=100.0, weight_decay=0.0)
    largest, seen = 0.0, 0
    for name, update in updates(world, case, reduce_dtype=reduce_dtype).items():
        stack = update.reshape(-1, *update.shape[-2:])
        for matrix in stack:
            sigma = torch.linalg.svdvals(matrix.double()) / (0.2 * math.sqrt(max(matrix.shape)))
            assert BAND[0] < float(sigma.median()) < BAND[1], name
            assert float(sigma.max()) < BAND[1] + 0.06, name
            largest, seen = max(largest, float(sigma.max())), seen + 1
    figure(
        f"{policy}, {dtype}, summed in {reduce_dtype}: {seen} matrices orthogonal, singular values up to {largest:.3f}"
    )


def test_02_update_points_along_the_polar_factor() -> None:
    case = Case(weight_decay=0.0)
    mean = {
        name: torch.stack([gradients(case, 0, 0, rank, 2)[name] for rank in range(2)]).mean(0)  # type: ignore[misc]
        for name in ("tall", "wide", "odd", "square")
    }
    got = updates(2, case)
    for name, gradient in mean.items():
        target = polar(gradient)
        cosine = float((got[name].double() * target).sum() / (got[name].double().norm() * target.norm()))
        assert cosine > 0.95, name
        assert 0.16 < rms(got[name]) < 0.215, name


@pytest.mark.fault("S3")
@pytest.mark.parametrize("overflow_at", [0, 1, 7])
def test_03_overflow_leaves_the_momentum_alone(overflow_at: int, figure: Figure) -> None:
    """Under a GradScaler on every rank; training goes on afterwards."""

    def body(rank: int, world: int) -> int:
        params = parameters(torch.float16)
        opt = optimizer(params, Case())
        scaler = distmuon.GradScaler("cpu", init_scale=2.0**4)
        for step in range(9):
            grads = gradients(Case(dtype="float16"), step, 0, rank, world)
            if step == overflow_at:
                grads["square"] = torch.full((16, 16), math.inf, dtype=torch.float16)
            backward(params, grads, scaler.scale(torch.tensor(1.0)))
            before = digest((params, opt.state_dict()))
            scaler.step(opt)
            scaler.update()
            assert (digest((params, opt.state_dict())) == before) == (step == overflow_at)
            opt.zero_grad()
        return int(opt.skipped_steps)

    skipped = run_threads(2, body)
    figure(f"overflow at step {overflow_at}: {skipped[0]} of 9 steps skipped, with every bit of the state kept")
    assert skipped == [1, 1]


@pytest.mark.fault("S4")
@pytest.mark.parametrize("clip", [None, 1.0])
def test_04_loss_scale_does_not_matter(clip: float | None, figure: Figure) -> None:
    """A power of two changes no bit."""

    def body(rank: int, world: int, scale: float) -> list[str]:
        params = parameters()
        opt = optimizer(params, Case(clip=clip, exact=True))
        scaler = distmuon.GradScaler("cpu", init_scale=scale)
        digests = []
        for step in range(3):
            backward(params, gradients(Case(exact=True), step, 0, rank, world), scaler.scale(torch.tensor(1.0)))
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            digests.append(digest(params))
        return digests

    unscaled = run_threads(2, train, Case(clip=clip, exact=True))[0].digests
    scales = (1.0, 2.0**8, 2.0**16)
    equal = [run_threads(2, body, scale) == [unscaled] * 2 for scale in scales]
    figure(f"clip {clip}: bits equal to an unscaled loss's at {sum(equal)} of {len(equal)} scales up to {scales[-1]:g}")
    assert all(equal)


@pytest.mark.fault("S5")
@pytest.mark.parametrize("policy", ["balanced", "flat"])
def test_05_momentum_advances_once_per_step(policy: str, figure: Figure) -> None:
    """Four micro-batches and their sum at once give the same three steps."""

    def summed(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
        parts = [gradients(case, step, m, rank, world) for m in range(4)]
        return {name: sum(part[name] for part in parts) for name in MODEL}  # type: ignore[misc]

    start = plain(parameters())
    four = matrices(run_threads(2, train, Case(policy=policy, accumulation=4))[0], start)
    once = matrices(run_threads(2, train, Case(policy=policy), None, summed)[0], start)
    worst = max(relative(four[name], once[name]) for name in MATRICES)
    figure(f"{policy}: 4 micro-batches and their sum at once differ by {worst:.1e} after 3 steps")
    assert worst < 1e-5


@pytest.mark.fault("S7")
@pytest.mark.parametrize("ns", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_07_cut_matrices_are_equal_on_all_ranks(world: int, ns: str, figure: Figure) -> None:
    runs = run_threads(world, train, Case(policy="flat", ns=ns, steps=5))
    assert max(runs[0].holders.values()) > 1
    equal = sum(run.digests == runs[0].digests for run in runs)
    figure(f"{ns}: {equal} of {world} ranks bit-equal after each of 5 steps, with matrices cut by shard edges")
    assert equal == world


@pytest.mark.fault("S8")
@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_08_first_step_after_resuming(dtype: torch.dtype, reduce_dtype: torch.dtype, figure: Figure) -> None:
    """State restored into parameters of the same dtype works for every gradient dtype and is finite."""

    def body(rank: int, world: int) -> bool:
        params = parameters(dtype)
        case = Case(dtype=str(dtype).removeprefix("torch."))
        opt = optimizer(params, case, reduce_dtype=reduce_dtype)
        for step in range(3):
            before = digest(params)
            backward(params, gradients(case, step, 0, rank, world))
            opt.step()
            assert digest(params) != before
            state = opt.state_dict()
            params = {name: Parameter(p.detach().clone()) for name, p in params.items()}
            opt = optimizer(params, case, reduce_dtype=reduce_dtype)
            opt.load_state_dict(state)
        return all(bool(p.isfinite().all()) for p in params.values())

    finite = sum(run_threads(2, body))
    figure(f"{dtype}, summed in {reduce_dtype}: 3 resumptions, finite on {finite} of 2 ranks")
    assert finite == 2


@pytest.mark.fault("S10", "F14")
@pytest.mark.parametrize("exponent", [-20, -30, -40, -50, -59])
def test_10_tiny_gradients_are_orthogonalized(exponent: int, figure: Figure) -> None:
    """No eps floor: down to 2^-59 (1.7e-18) the update has the length it has at scale 1."""

    def length(scale: float) -> float:
        def body(rank: int, world: int) -> float:
            w = Parameter(torch.zeros(8, 12))
            opt = distmuon.DistMuon([{"params": [("w", w)], "kind": "muon"}], lr=1.0)
            gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(rank))
            (w * (gradient * scale)).sum().backward()
            opt.step()
            return float(w.detach().norm())

        return float(run_threads(2, body)[0])

    off = abs(length(2.0**exponent) / length(1.0) - 1)
    figure(f"gradients times {2.0**exponent:.1e}: |update| changes by {off:.1e}")
    assert off < 0.01


@pytest.mark.fault("S11")
@pytest.mark.parametrize("position", [*MODEL, "all"])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
def test_11_zero_gradient_anywhere(policy: str, position: str, figure: Figure) -> None:
    """0/0 nowhere: a zero gradient leaves its parameter where it was and the others finite."""

    def source(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
        return {
            name: torch.zeros_like(g) if g is not None and position in (name, "all") else g
            for name, g in gradients(case, step, micro, rank, world).items()
        }

    case = Case(policy=policy, ns="bfloat16", weight_decay=0.0, clip=1.0, steps=2)
    run = run_threads(2, train, case, None, source)[0]
    start = plain(parameters())
    still = sum(run.params[name] == start[name] for name in MODEL)
    figure(f"{policy}, zero gradient of {position}: {still} of {len(MODEL)} parameters stay, all are finite")
    for name in MODEL:
        assert all(map(math.isfinite, run.params[name]))
        assert (run.params[name] == start[name]) == (position in (name, "all")), name


@pytest.mark.fault("S12", "F13")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["balanced", "flat"])
def test_12_state_exists_before_the_first_step(policy: str, dtype: str, figure: Figure) -> None:
    """Nothing is created lazily: every tensor of the state has its place and size from the start."""

    def layout(opt: Any) -> list[tuple[str, Any]]:
        return [
            (path, tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None)
            for path, leaf in leaves(opt.state_dict())
        ]

    def body(rank: int, world: int) -> tuple[bool, list[str]]:
        case = Case(policy=policy, dtype=dtype)
        params = parameters(case.torch_dtype)
        opt = optimizer(params, case)
        before, held = layout(opt), opt.state_bytes()
        advance(params, opt, [gradients(case, 0, 0, rank, world)])
        opt.step()
        same = layout(opt) == before and opt.state_bytes() == held
        return same, sorted(opt.state_dict())

    results = run_threads(3, body)
    kept = sum(same for same, _ in results)
    figure(f"{policy}, {dtype}: the first step leaves the layout of the state as it was on {kept} of 3 ranks")
    assert kept == 3
    assert len({tuple(keys) for _, keys in results}) == 1
