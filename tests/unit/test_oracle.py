"""The reference itself is right: against torch's optimizers where they can express it, and Lemma 1."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracle import OracleMuon, Settings, newton_schulz, polar, relative, rms

SHAPES = [(16, 8), (8, 32), (5, 7), (1, 12), (12, 1), (16, 16), (48, 96)]
BF16_BAND = 0.03
"""bf16 rounds the Gram matrix, the polynomial (up to 2.5) and X to 2^-9 in each iteration; the slope of the
polynomial lets about three iterations' worth survive: 1 to 2 % of the norm, measured as well."""


def sequence(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def run(oracle: OracleMuon, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        oracle.step([{"w": gradient}])
    return oracle.masters["w"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_torch_muon(shape: tuple[int, int], nesterov: bool, momentum: float) -> None:
    """torch stores (1 - momentum) times our momentum; the direction is the same up to its bf16 rounding."""
    start, *gradients = sequence(shape, 4)
    settings = Settings(lr=0.05, weight_decay=0.3, momentum=momentum, nesterov=nesterov)
    ours = run(OracleMuon({"w": start}, {"w": settings}), gradients)
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon(
        [parameter],
        lr=0.05,
        weight_decay=0.3,
        momentum=momentum,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        theirs.step()
    decay = (1 - 0.05 * 0.3) ** 3 * start
    assert relative(parameter.detach() - decay, ours - decay) < BF16_BAND


@pytest.mark.parametrize("shape", [*SHAPES, (3, 8, 16)])
def test_precisions_agree(shape: tuple[int, ...]) -> None:
    """fp32 agrees with float64 to a few units of its rounding, bf16 within its band."""
    (u,) = sequence(shape, 1)
    exact = newton_schulz(u)
    assert relative(newton_schulz(u, torch.float32), exact) < 2e-6
    assert relative(newton_schulz(u, torch.bfloat16), exact) < BF16_BAND


@pytest.mark.parametrize(("beta2", "eps", "decay"), [(0.95, 1e-8, 0.1), (0.999, 1e-3, 0.0)])
def test_torch_adamw(beta2: float, eps: float, decay: float) -> None:
    start, *gradients = sequence((7,), 6)
    start, gradients = start.double(), [gradient.double() for gradient in gradients]
    settings = Settings(kind="adamw", lr=0.02, weight_decay=decay, betas=(0.9, beta2), eps=eps)
    ours = run(OracleMuon({"w": start}, {"w": settings}), gradients)
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=0.02, betas=(0.9, beta2), eps=eps, weight_decay=decay)
    for gradient in gradients:
        parameter.grad = gradient
        theirs.step()
    torch.testing.assert_close(ours, parameter.detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("shape", "rank"), [((64, 64), 64), (SHAPES[-1], 48), ((32, 32), 4), ((12, 1), 1)])
def test_lemma_1(shape: tuple[int, int], rank: int) -> None:
    """RMS of the exact polar factor is sqrt(r / (A B))."""
    rows, columns = shape
    left, right = sequence((rows, rank), 1)[0], sequence((rank, columns), 1, seed=1)[0]
    assert rms(polar(left @ right, rtol=1e-5)) == pytest.approx(math.sqrt(rank / (rows * columns)), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_update_rms(shape: tuple[int, int]) -> None:
    """The scaled polar factor has RMS 0.2; five quintic steps land 15 % below to 5 % above (a row: 30 %)."""
    (gradient,) = sequence(shape, 1)
    scale = 0.2 * math.sqrt(max(shape))
    assert rms(scale * polar(gradient)) == pytest.approx(0.2, rel=1e-9)
    settings = Settings(lr=1.0, weight_decay=0.0, momentum=0.0)
    update = run(OracleMuon({"w": torch.zeros(shape)}, {"w": settings}), [gradient])
    low = 0.69 if min(shape) == 1 else 0.85
    assert low * 0.2 < rms(update) < 1.05 * 0.2


def test_missing_gradient_is_zero_and_ranks_are_averaged() -> None:
    first, second = sequence((4, 4), 2)
    settings = {"w": Settings(lr=0.1)}
    split = OracleMuon({"w": first}, settings)
    split.step([{"w": second}, {"w": None}, {"w": 2 * second}])
    whole = OracleMuon({"w": first}, settings)
    whole.step([{"w": second}])
    assert relative(split.masters["w"], whole.masters["w"]) < 1e-6


def test_clip_uses_the_raw_global_norm() -> None:
    settings = {"w": Settings(), "b": Settings(kind="adamw")}
    start = {"w": torch.zeros(2, 2), "b": torch.zeros(3)}
    oracle = OracleMuon(start, settings, max_grad_norm=1.0)
    norm = oracle.step([{"w": torch.full((2, 2), 3.0), "b": torch.full((3,), 4.0)}], scale=0.5)
    assert norm == pytest.approx(2 * math.sqrt(4 * 9 + 3 * 16))
    clipped = torch.full((2, 2), 6.0 / norm, dtype=torch.float64)
    torch.testing.assert_close(oracle.states["w"].first, clipped, rtol=1e-6, atol=0)


def test_non_finite_gradient_is_skipped() -> None:
    oracle = OracleMuon({"w": torch.ones(2, 2)}, {"w": Settings()})
    oracle.step([{"w": torch.ones(2, 2)}, {"w": torch.full((2, 2), math.inf)}])
    assert oracle.skipped_steps == 1
    assert torch.equal(oracle.params["w"], torch.ones(2, 2))
    assert not oracle.states["w"].first.any()


def test_sixteen_bit_parameter_has_a_master() -> None:
    """Updates far below one bf16 step of the parameter add up in the master."""
    settings = Settings(lr=1e-3, weight_decay=0.0, momentum=0.0)
    oracle = OracleMuon({"w": torch.ones(1, 4).bfloat16()}, {"w": settings})
    for _ in range(50):
        oracle.step([{"w": torch.ones(1, 4)}])
    assert oracle.params["w"].dtype is torch.bfloat16
    assert float(oracle.params["w"][0, 0]) < 1.0


@pytest.mark.parametrize("scale", [1.0, 2.0**-30, 2.0**-60, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    (u,) = sequence((8, 12), 1)
    result = newton_schulz(u * scale, dtype)
    assert torch.equal(result, newton_schulz(u, dtype) if scale else torch.zeros_like(result))
