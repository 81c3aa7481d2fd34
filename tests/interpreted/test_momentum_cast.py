"""momentum_cast against torch's separate operations, bit for bit, and its partial norms against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from distmuon.kernels import reference, triton_ops
from tests.interpreted import checks
from tests.interpreted.checks import BRAIN, HALF, SINGLE
from tests.interpreted.interpreter import launches, shuffled

LENGTHS = [1, 5, 1023, 1024, 2048, 2049, 4097, 9000]
MU = 0.95


def vectors(length: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Momentum and gradient, with zeros of both signs where there is room."""
    generator = torch.Generator().manual_seed(seed + length)
    m, g = torch.randn(2, length, generator=generator).mul(scale).unbind()
    m, g = m.contiguous(), g.contiguous()
    if length > 4:
        m[:2], g[:2] = -0.0, torch.tensor([0.0, -0.0])
    return m, g


def expected(
    momentum: Tensor, grad: Tensor, nesterov: bool, dtype: torch.dtype, mu: float = MU
) -> tuple[Tensor, Tensor]:
    m = momentum.clone().mul_(mu).add_(grad)
    return m, (m.mul(mu).add_(grad) if nesterov else m).to(dtype)


def assert_same_bits(x: Tensor, y: Tensor) -> None:
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    same = (x == y) & (x.signbit() == y.signbit()) | x.isnan() & y.isnan()
    assert bool(same.all()), f"{int((~same).sum())} of {x.numel()} differ"


def check(momentum: Tensor, grad: Tensor, nesterov: bool, dtype: torch.dtype, mu: float = MU) -> tuple[Tensor, Tensor]:
    """u and partials, after comparing everything but the partials with torch."""
    m, g = momentum.clone(), grad.clone()
    address = m.data_ptr()
    u, partials = triton_ops.momentum_cast(m, g, mu, nesterov, dtype)
    m_expected, u_expected = expected(momentum, grad, nesterov, dtype, mu)
    assert_same_bits(m, m_expected)
    assert m.data_ptr() == address
    assert_same_bits(u, u_expected)
    assert_same_bits(g, grad)
    assert u.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (m, g)}
    assert partials.dtype == torch.float32
    assert partials.shape[1:] == (2,)
    return u, partials


def assert_norm(partials: Tensor, u: Tensor) -> None:
    exact = float(u.double().norm())
    assert checks.norm(partials) == pytest.approx(exact, rel=1e-6, abs=0.0)
    assert float(partials[:, 0].max()) == float(u.float().abs().max())
    # Each block sums the squares of values below 2, the largest of them at least 1 unless it is subnormal.
    largest, squares = partials.unbind(1)
    assert bool(((squares >= 1) | (largest < 2**-126)).all())
    assert bool((squares < 4 * reference.NORM_BLOCK).all())


@pytest.mark.fault("F17")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length: int, dtype: torch.dtype, nesterov: bool, figure: Callable[[str], None]) -> None:
    u, partials = check(*vectors(length), nesterov, dtype)
    assert_norm(partials, u)
    off = abs(checks.norm(partials) / float(u.double().norm()) - 1)
    figure(f"momentum, {dtype}: every bit that of torch, norm within {off:.0e}")


@pytest.mark.parametrize("mu", [0.0, 0.1, 0.5, 0.95, 1 - 2**-20])
def test_every_mu(mu: float) -> None:
    u, partials = check(*vectors(2000), True, SINGLE, mu)
    assert_norm(partials, u)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
@pytest.mark.parametrize("k", [-90, -41, -1, 1, 63, 64, 90])
def test_powers_of_two_change_nothing_but_the_exponent(k: int, dtype: torch.dtype, nesterov: bool) -> None:
    m, g = vectors(4097)
    factor = 2.0**k
    u, partials = check(m, g, nesterov, dtype)
    u_scaled, scaled = check(m * factor, g * factor, nesterov, dtype)
    assert_same_bits(u_scaled, u * factor)
    assert_same_bits(scaled[:, 0], partials[:, 0] * factor)
    assert_same_bits(scaled[:, 1], partials[:, 1])
    assert checks.norm(scaled) == checks.norm(partials) * factor


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-19, 1e19, 1e30, 3e37])
def test_norms_of_huge_and_tiny_values(scale: float, dtype: torch.dtype) -> None:
    u, partials = check(*vectors(5000, scale), True, dtype)
    assert_norm(partials, u)


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
def test_huge_beside_tiny(dtype: torch.dtype) -> None:
    m, g = vectors(9000)
    scales = torch.logspace(-44, 37, 9000)
    u, partials = check(m * scales, g * scales, True, dtype)
    assert_norm(partials, u)


POWERS = [2.0**k for k in (-149, -126, -63, -62, 0, 1, 62, 63, 127)]


@pytest.mark.parametrize("value", [*POWERS, 1.5, 1.9999999, 3.4028234e38])
def test_one_value(value: float) -> None:
    """The largest element lies between 1 and 2 after scaling, at every power of two but the subnormal ones."""
    _, partials = check(torch.tensor([0.0]), torch.tensor([-value]), False, SINGLE)
    stored = float(torch.tensor(value))
    scaled = stored / checks.power_of_two(stored)
    assert partials.tolist() == [[stored, pytest.approx(scaled**2, rel=1e-7, abs=0.0)]]


@pytest.mark.parametrize("length", [1, 3000])
def test_zeros(length: int) -> None:
    _, partials = check(torch.zeros(length), torch.zeros(length), True, BRAIN)
    assert checks.norm(partials) == 0
    assert not partials.any()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_and_shows_in_the_norm(value: float, dtype: torch.dtype, nesterov: bool) -> None:
    m, g = vectors(5000)
    g[4500] = value
    u, partials = check(m, g, nesterov, dtype)
    assert torch.nonzero(~u.isfinite()).tolist() == [[4500]]
    assert not math.isfinite(checks.norm(partials))
    assert partials.isnan()[:, 1].tolist() == [False, True]


@pytest.mark.parametrize("values", [[math.nan, math.inf], [math.inf, -math.inf], [math.nan, math.nan]])
def test_nothing_finite(values: list[float]) -> None:
    _, partials = check(torch.zeros(2), torch.tensor(values), False, SINGLE)
    assert not math.isfinite(checks.norm(partials))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_cast_that_overflows_shows_in_the_norm() -> None:
    """The norm is that of the values after the cast."""
    u, partials = check(torch.zeros(4), torch.tensor([1.0, 65520.0, 2.0, 3.0]), False, HALF)
    assert u.isinf().tolist() == [False, True, False, False]
    assert not math.isfinite(checks.norm(partials))


def test_the_norm_is_that_of_the_values_after_the_cast() -> None:
    u, partials = check(torch.zeros(1), torch.tensor([1.0 + 3 * 2**-8]), False, BRAIN)
    assert u.item() == 1.0 + 2**-6
    assert partials.tolist() == [[u.item(), u.item() ** 2]]


def test_the_order_of_the_programs_does_not_matter() -> None:
    u, partials = check(*vectors(30000), True, BRAIN)
    for seed in (1, 2, 3):
        with shuffled(seed):
            other, other_partials = check(*vectors(30000), True, BRAIN)
        assert torch.equal(u, other)
        assert torch.equal(partials, other_partials)


@pytest.mark.parametrize("module", [triton_ops, reference], ids=["kernel", "twin"])
def test_an_empty_shard(module: ModuleType) -> None:
    u, partials = module.momentum_cast(torch.zeros(0), torch.zeros(0), MU, True, BRAIN)
    assert (u.shape, u.dtype) == ((0,), BRAIN)
    assert partials.shape == (0, 2)


def test_multiplication_and_addition_are_not_fused() -> None:
    """The interpreter never fuses; a compiler does, unless it is told not to."""
    with launches() as found:
        check(*vectors(10), True, BRAIN)
    assert found[0].arguments["enable_fp_fusion"] is False


@pytest.mark.parametrize("cut", [1, 777, 4096])
def test_a_shard_boundary_changes_no_bits(cut: int) -> None:
    m, g = vectors(6000)
    whole, _ = check(m, g, True, BRAIN)
    parts = [check(m[part], g[part], True, BRAIN)[0] for part in (slice(0, cut), slice(cut, None))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_twin_agrees(dtype: torch.dtype, scale: float) -> None:
    m, g = vectors(9000, scale)
    u, partials = check(m, g, True, dtype)
    m_twin = m.clone()
    u_twin, partials_twin = reference.momentum_cast(m_twin, g, MU, True, dtype)
    assert_same_bits(u_twin, u)
    assert_same_bits(m_twin, expected(m, g, True, dtype)[0])
    assert_same_bits(partials_twin[:, 0], partials[:, 0])
    torch.testing.assert_close(partials_twin[:, 1], partials[:, 1], rtol=1e-6, atol=0, equal_nan=True)
