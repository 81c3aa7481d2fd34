"""Gradients of any size: the update has the length it has at norm 1, zero stays zero, nothing leaves the finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import distmuon
from distmuon import orthogonalize
from tests.accuracy.judged import setting
from tests.distributed.scenario import leaves
from tests.ranks import run_threads

Figure = Callable[[str], None]

PRESETS = {
    "plain": ["papers", "you", "polar_express", "cans", "cubic5", "papers8+2", "opt4", "opt5", "opt6"],
    "gram": ["papers", "papers8+2", "opt4", "opt5", "opt6"],
}
PRECISIONS = ("bfloat16", "float16", "float32")
RANGES = {torch.float64: (-300, 300), torch.float32: (-36, 38), torch.bfloat16: (-36, 38), torch.float16: (-2, 5)}
"""Powers of ten between which a matrix of this norm has full precision in all its elements."""
VANISHING = {torch.float64: 323, torch.float32: 46, torch.bfloat16: 42, torch.float16: 9}
"""The power of ten below which every element is zero."""
TOLERANCE = 0.01
ERRATIC = setting("cans", "plain", "bfloat16")
"""Leaves its range in bfloat16, so that the rounding of the input shows: only powers of two change nothing."""


def matrix() -> Tensor:
    """A float64 matrix of norm 1."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x / x.norm()


def norm(x: Tensor) -> float:
    assert bool(x.isfinite().all())
    return float(x.double().norm())


@pytest.mark.fault("F14")
@pytest.mark.parametrize("dtype", RANGES, ids=str)
@pytest.mark.parametrize("form", PRESETS)
def test_every_preset_at_every_size(form: str, dtype: torch.dtype, figure: Figure) -> None:
    low, high = RANGES[dtype]
    powers = sorted({low, high, -20, -18, -9, -2, 4, 30} & set(range(low, high + 1)))
    methods = [setting(name, form, precision) for name in PRESETS[form] for precision in PRECISIONS]
    methods = [ns for ns in methods if ns != ERRATIC]
    worst = 0.0
    for ns in methods:
        unit = norm(orthogonalize(matrix().to(dtype), ns))
        for power in powers:
            found = norm(orthogonalize((matrix() * 10.0**power).to(dtype), ns))
            worst = max(worst, abs(found / unit - 1))
    figure(
        f"{form} form, {len(methods)} methods, {str(dtype)[6:]} input, norms 1e{low} to 1e{high}: "
        f"|update| within {100 * worst:.2g} %"
    )
    assert worst < TOLERANCE


@pytest.mark.fault("F14")
@pytest.mark.parametrize("dtype", RANGES, ids=str)
def test_what_vanishes_stays_finite_and_zero_stays_zero(dtype: torch.dtype, figure: Figure) -> None:
    """Subnormal elements are few and coarse, so the update may be shorter, but never longer."""
    methods = [setting(n, form, p) for form, names in PRESETS.items() for n in names for p in PRECISIONS]
    longest = 0.0
    for ns in methods:
        unit = norm(orthogonalize(matrix().to(dtype), ns))
        for power in range(RANGES[dtype][0] - 1, -VANISHING[dtype] - 1, -1):
            length = norm(orthogonalize((matrix() * 10.0**power).to(dtype), ns)) / unit
            longest = max(longest, 0.0 if ns == ERRATIC else length)
        assert not orthogonalize(torch.zeros(40, 64, dtype=dtype), ns).any()
    figure(f"{str(dtype)[6:]} subnormals, {len(methods)} methods: finite, |update| at most {longest:.3f} of the usual")
    assert longest < 1.1


def step_lengths(make: Any, dtype: torch.dtype, powers: list[int]) -> list[float]:
    """Length of the first update of a matrix from gradients of norm 10^power."""
    lengths = []
    for power in powers:
        w = Parameter(torch.zeros(40, 64, dtype=dtype))
        opt = make([{"params": [("w", w)], "kind": "muon"}], lr=1.0, weight_decay=0.0)
        (w * (matrix() * 10.0**power).to(dtype)).sum().backward()  # type: ignore[no-untyped-call]
        opt.step()
        assert opt.skipped_steps == 0
        assert all(bool(x.isfinite().all()) for _, x in leaves(opt.state_dict()) if isinstance(x, Tensor))
        lengths.append(norm(w.detach()))
    return lengths


@pytest.mark.fault("F14")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world", [0, 1, 3])
def test_optimizers_at_every_size(world: int, dtype: torch.dtype, figure: Figure) -> None:
    """A world of 0 is the single-device Muon; 3 ranks share the matrix under the flat policy."""
    low, high = RANGES[dtype]
    # A float16 gradient is stored with few digits where its norm is below 1.
    powers = sorted({low, high, -20, -18, -9, -4, -1, 0, 3, 30} & set(range(max(low, -30), min(high, 36))))

    def body(rank: int, ranks: int) -> list[float]:
        def make(*args: Any, **kwargs: Any) -> distmuon.DistMuon:
            return distmuon.DistMuon(*args, policy="flat", **kwargs)

        return step_lengths(make, dtype, powers)

    runs = run_threads(world, body) if world else [step_lengths(distmuon.Muon, dtype, powers)]
    assert all(run == runs[0] for run in runs)
    unit = runs[0][powers.index(0)]
    worst = max(abs(length / unit - 1) for length in runs[0])
    who = f"DistMuon on {world} ranks" if world else "Muon"
    figure(
        f"{who}, {str(dtype)[6:]}, gradient norms 1e{powers[0]} to 1e{powers[-1]}: |update| within {100 * worst:.2g} %"
    )
    assert worst < TOLERANCE


@pytest.mark.fault("F14")
@pytest.mark.parametrize("make", [distmuon.Muon, distmuon.DistMuon])
def test_zero_moves_nothing(make: Any, figure: Figure) -> None:
    w = Parameter(matrix().float())
    opt = make([{"params": [("w", w)], "kind": "muon"}], lr=1.0, weight_decay=0.0)
    for _ in range(3):
        w.grad = torch.zeros_like(w)
        opt.step()
    moved = float((w.detach() - matrix().float()).abs().max())
    figure(f"{make.__name__}: a zero gradient moved a weight by {moved:g}")
    assert moved == 0


@pytest.mark.fault("F14")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [distmuon.Muon, distmuon.DistMuon])
@pytest.mark.parametrize("power", [-45, -30, -20, 10, 18, 20, 30])
def test_adamw_stays_finite(power: int, make: Any, dtype: torch.dtype, figure: Figure) -> None:
    """Squares leave the range of float32 long before gradients do; then no later step may find them infinite."""
    p = Parameter(torch.ones(6, dtype=dtype))
    opt = make([("p", p)], lr=0.1)
    for gradient in (10.0**power, 1.0):
        p.grad = torch.full_like(p, gradient)
        opt.step()
    held = [x for _, x in leaves(opt.state_dict()) if isinstance(x, Tensor)]
    finite = sum(bool(x.isfinite().all()) for x in (p.detach(), *held))
    figure(f"{make.__name__}, AdamW, gradient 1e{power}: {finite} of {1 + len(held)} tensors finite")
    assert finite == 1 + len(held)
    assert math.isfinite(float(p.detach().sum()))
