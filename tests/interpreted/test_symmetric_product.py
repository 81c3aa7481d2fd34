"""symmetric_product and symmetric_product_norm against float64: both variants of the kernel, and the twin.

Shapes: B matrices, N rows, K the side that a product sums over.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distmuon.kernels.tuning import Config
from tests.interpreted import checks
from tests.interpreted.checks import BRAIN, HALF, SINGLE, every_view, matrices, pair, symmetric
from tests.interpreted.interpreter import shuffled
from tests.interpreted.launchers import CONFIG, EVERY, KERNELS, POINTER, TINY, TWIN, launchers, takes

Figure = Callable[[str], None]
SHAPES = [(1, 1), (1, 8), (8, 1), (8, 8), (130, 72), (257, 40), (64, 64), (128, 200), (200, 104)]
SCALARS = torch.tensor([[0.7, -1.3, 2.9], [-3.1, 0.4, -0.6], [1.0, 1.0, 0.0]])
every = pytest.mark.parametrize("variant", EVERY)
kernels = pytest.mark.parametrize("variant", KERNELS)


def run(
    variant: str, a: Tensor, b: Tensor, c: Tensor | None, scalars: Tensor, config: Config = CONFIG
) -> tuple[Tensor, Tensor]:
    """Results and sums of squares, after checking every promise that holds for all inputs."""
    given = [x for x in (a, b, c, scalars) if x is not None]
    copies = [x.clone() for x in given]
    y, sums = launchers(variant, config).symmetric_product_norm(a, b, c, scalars)
    for x, copy in zip(given, copies, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    assert y.dtype == a.dtype
    assert sums.dtype == torch.float32
    assert sums.shape == a.shape[:1]
    torch.testing.assert_close(y, y.mT, rtol=0, atol=0, equal_nan=True)
    return y, sums


def check(
    variant: str, a: Tensor, b: Tensor, c: Tensor | None, scalars: Tensor, config: Config = CONFIG
) -> tuple[Tensor, Tensor]:
    y, sums = run(variant, a, b, c, scalars, config)
    exact = checks.symmetric_product(a, b, c, scalars)
    checks.assert_rounded_once(y, exact)
    torch.testing.assert_close(sums.double(), exact.square().sum(dim=(-2, -1)), rtol=1e-5, atol=0)
    return y, sums


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    ("variant", "dtype", "shape"),
    [(v, d, s) for v in EVERY for d in (BRAIN, HALF, SINGLE) for s in SHAPES if takes(v, d, *s)],
    ids=str,
)
def test_every_shape(variant: str, dtype: torch.dtype, shape: tuple[int, int], figure: Figure) -> None:
    x = matrices(2, *shape, dtype)
    c = symmetric(2, shape[0], dtype)
    y, _ = check(variant, x, x, c, SCALARS[:2])
    worst = checks.assert_rounded_once(y, checks.symmetric_product(x, x, c, SCALARS[:2]))
    figure(f"symmetric product, {variant}, {dtype}: within {worst:.2f} of the rounding of the float64 result")


@every
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_the_norm_changes_no_bits(batch: int, with_c: bool, variant: str) -> None:
    x, c = matrices(batch, 72, 40, BRAIN), symmetric(batch, 72, BRAIN) if with_c else None
    y, _ = check(variant, x, x, c, SCALARS[0])
    assert torch.equal(launchers(variant).symmetric_product(x, x, c, SCALARS[0]), y)


@every
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize(
    "scalars",
    [(1.0, 0.0, 0.0), (-0.7, 0.0, 0.0), (1.0, 0.0, 2.5), (0.3, -1.7, 0.0), (0.0, 1.5, 0.5), (2.0, 1.0, -70.0)],
    ids=str,
)
def test_every_term(scalars: tuple[float, float, float], with_c: bool, variant: str) -> None:
    a, b = pair(1, 136, 72, BRAIN)
    check(variant, a, b, symmetric(1, 136, BRAIN) if with_c else None, torch.tensor(scalars))


@pytest.mark.parametrize("variant", KERNELS)
@pytest.mark.parametrize("config", [TINY, Config(32, 64, 128, 4, 2, 3), Config(128, 128, 32, 8, 3)], ids=str)
def test_every_size_of_tiles(config: Config, variant: str) -> None:
    a, b = pair(1, 104, 40, HALF)
    check(variant, a, b, symmetric(1, 104, HALF), SCALARS[:1], config)


@every
def test_beta_means_nothing_without_c(variant: str) -> None:
    x = matrices(1, 40, 40, SINGLE)
    with_nan = run(variant, x, x, None, torch.tensor([1.5, math.nan, 0.5]))
    assert torch.equal(with_nan[0], run(variant, x, x, None, torch.tensor([1.5, 0.0, 0.5]))[0])


@every
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
def test_symmetric_although_the_operands_are_rounded(dtype: torch.dtype, variant: str) -> None:
    """B is a rounded polynomial of A: A B^T is symmetric up to that rounding only, the result is, bit for bit."""
    r = symmetric(2, 200, dtype)
    z = (r.double() @ r.double() / 200).to(dtype)
    product = checks.symmetric_product(r, z, None, SCALARS[:2])
    assert not torch.equal(product.to(dtype), product.mT.to(dtype))
    y, sums = run(variant, r, z, r, SCALARS[:2])
    torch.testing.assert_close(sums, y.float().square().sum(dim=(-2, -1)), rtol=1e-3, atol=0)


@kernels
def test_the_order_of_the_programs_does_not_matter(variant: str) -> None:
    a, b = pair(2, 136, 40, BRAIN)
    c = symmetric(2, 136, BRAIN)
    y, sums = run(variant, a, b, c, SCALARS[:2])
    for seed in (1, 2, 3):
        with shuffled(seed):
            other, other_sums = run(variant, a, b, c, SCALARS[:2])
        assert torch.equal(y, other)
        assert torch.equal(sums, other_sums)


@kernels
def test_a_matrix_gets_the_same_bits_in_any_batch(variant: str) -> None:
    x, c = matrices(3, 72, 40, BRAIN), symmetric(3, 72, BRAIN)
    y, sums = run(variant, x, x, c, SCALARS)
    for i in range(3):
        alone, alone_sum = run(variant, x[i : i + 1], x[i : i + 1], c[i : i + 1], SCALARS[i])
        assert torch.equal(alone[0], y[i])
        assert torch.equal(alone_sum[0], sums[i])


@every
@every_view
def test_strides_change_no_bits(view: Callable[[Tensor], Tensor], variant: str) -> None:
    a, b = pair(2, 72, 40, BRAIN)
    c, table = symmetric(2, 72, BRAIN), SCALARS[:2].mT.contiguous().mT
    y, sums = run(variant, a, b, c, SCALARS[:2])
    other, other_sums = run(variant, view(a), view(b), view(c), table)
    assert torch.equal(y, other)
    assert torch.equal(sums, other_sums)


@every
def test_one_matrix_for_the_whole_batch(variant: str) -> None:
    x = matrices(1, 72, 40, BRAIN)
    many = x.repeat(3, 1, 1)
    y, _ = run(variant, x.expand(3, 72, 40), x.expand(3, 72, 40), None, SCALARS)
    assert torch.equal(y, run(variant, many, many, None, SCALARS)[0])


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(value: float, variant: str) -> None:
    x = matrices(2, 136, 72, BRAIN)
    x[1, 70, 71] = value
    y, sums = run(variant, x, x, None, SCALARS[:2])
    bad = torch.zeros(2, 136, 136, dtype=torch.bool)
    bad[1, 70] = bad[1, :, 70] = True
    assert torch.equal(~y.isfinite(), bad)
    assert sums.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("variant", [POINTER, TWIN])
def test_the_sum_is_that_of_unrounded_elements(variant: str) -> None:
    x = torch.tensor([[[1.0 + 2**-7]]]).bfloat16()
    y, sums = run(variant, x, x, None, torch.tensor([1.0, 0.0, 0.0]))
    exact = torch.tensor((1.0 + 2**-7) ** 2)
    assert sums.item() == exact.square().item()
    assert sums.item() != y.item() ** 2


@pytest.mark.fault("F17")
@kernels
@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
def test_nearly_every_bit_is_that_of_the_twin(dtype: torch.dtype, variant: str, figure: Figure) -> None:
    """They differ where float32 sums in another order round to another 16-bit value."""
    a, b = pair(2, 200, 104, dtype)
    c = symmetric(2, 200, dtype)
    y, sums = run(variant, a, b, c, SCALARS[:2])
    twin, twin_sums = run(TWIN, a, b, c, SCALARS[:2])
    equal, off = float((y == twin).float().mean()), checks.ulps(y, twin)
    figure(
        f"symmetric product, {variant}, {dtype}: at most {off:.2g} ulp from the twin, {equal:.3f} of all elements equal"
    )
    if dtype != SINGLE:
        assert off <= 2
        assert equal > 0.99
    largest = float(twin.abs().max())
    torch.testing.assert_close(y, twin, rtol=2 * checks.ROUNDOFF[dtype], atol=2 * checks.ACCUMULATION * largest)
    torch.testing.assert_close(sums, twin_sums, rtol=1e-5, atol=0)
