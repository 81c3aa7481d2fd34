"""Matrix products on a CPU against float64: rounding, symmetry, numbers per matrix, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distmuon.kernels import cpu
from distmuon.kernels.cpu import LOOP_ROWS, PANEL, PANEL_INNER, PANEL_ROWS, CpuProducts
from distmuon.kernels.products import HALF_SQUARE, Products, TorchProducts, each, widened

# Half a unit in the last place relative to the largest binade, and float32 accumulation of what cancels.
ONE_ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
ACCUMULATION = 2e-6
ALL = [TorchProducts(), CpuProducts()]
# Smallest shapes of: widened bfloat16, one call per batch, one call per matrix.
SHAPES = [(1, 3), (16, 20), (17, 40), (LOOP_ROWS, LOOP_ROWS + 1)]
every_product = pytest.mark.parametrize("products", ALL, ids=["torch", "cpu"])
every_dtype = pytest.mark.parametrize("dtype", ONE_ROUNDING)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(batch: int, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X and symmetric P, Q, R with elements around 1 / sqrt(rows), rounded."""
    x = random(batch, rows, cols) / rows**0.5
    p = random(batch, rows, rows, seed=1)
    p = (p + p.mT) / (2 * rows**0.5)
    q = p @ p + 0.5 * p
    r = p - 0.3 * q
    return x.to(dtype), p.to(dtype), ((q + q.mT) / 2).to(dtype), ((r + r.mT) / 2).to(dtype)


def check(found: Tensor, exact: Tensor, roundings: int = 1, size: Tensor | None = None) -> None:
    """At most so many roundings to the dtype, the first ones of intermediate results no larger than ``size``."""
    ulp = ONE_ROUNDING[found.dtype]
    largest = exact.abs().amax()
    between = 0.0 if size is None else (roundings - 1) * ulp * size.abs()
    assert bool(((found.double() - exact).abs() <= ulp * exact.abs() + between + ACCUMULATION * largest).all())


@every_product
@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_one_rounding(shape: tuple[int, int], dtype: torch.dtype, products: Products) -> None:
    x, p, q, r = operands(3, *shape, dtype)
    X, P, Q, R = (t.double() for t in (x, p, q, r))
    check(products.gram(x), X @ X.mT)
    check(products.multiply(q, x), Q @ X)
    check(products.add_product(x, p, -1.7), -1.7 * X + P @ X)
    for alpha, beta in ((1.0, 2.5), (-0.7, 1.0), (0.3, -4.0), (1.0, 0.0)):
        check(products.product(p, q, r, alpha, beta), alpha * P @ Q + beta * R)
    for alpha in (1.0, 0.4):
        check(products.product(p, q, None, alpha, 0.0), alpha * P @ Q)


@every_product
@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_per_matrix(shape: tuple[int, int], dtype: torch.dtype, products: Products) -> None:
    """One rounding in a loop over matrices or in float32, two on a whole batch."""
    x, p, q, r = operands(3, *shape, dtype)
    X, P, Q, R = (t.double() for t in (x, p, q, r))
    alpha, beta = torch.tensor([1.5, -0.3, 1e-3]), torch.tensor([0.0, 2.3, -1.7])
    A, B = alpha.double().view(3, 1, 1), beta.double().view(3, 1, 1)
    loop = shape[0] >= LOOP_ROWS and isinstance(products, CpuProducts)
    roundings = 1 if loop or widened(x) == torch.float32 else 2
    check(products.product(p, q, r, alpha, beta), A * P @ Q + B * R, roundings, A * P @ Q)
    check(products.add_product(x, p, beta), B * X + P @ X, roundings, P @ X)
    check(products.product(p, q, None, alpha, 0.0), A * P @ Q, roundings, A * P @ Q)


@pytest.fixture
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of 20 rows from 60 x 70 on."""
    for name, value in (("PANEL", 20), ("PANEL_ROWS", 60), ("PANEL_INNER", 70)):
        monkeypatch.setattr(cpu, name, value)


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("shape", [(60, 70), (61, 300), (79, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_of_the_gram_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (random(2, *shape) / shape[1] ** 0.5).to(dtype)
    found = CpuProducts().gram(x)
    assert torch.equal(found, found.mT)
    check(found, x.double() @ x.double().mT)


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("rows", [70, 80, 93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_of_square_products(dtype: torch.dtype, rows: int) -> None:
    """One rounding, also with numbers per matrix; a mirror image outside the blocks on the diagonal."""
    _, p, q, r = operands(2, rows, 1, dtype)
    exact = p.double() @ q.double()
    block = torch.arange(rows) // 20
    apart = block[:, None] != block
    # Rounded operands do not quite commute: what is above the diagonal blocks is the product from below them.
    exact = torch.where(block[:, None] >= block, exact, exact.mT)
    numbers = torch.tensor([[0.3, -1.0], [2.0, 0.1]])
    for alpha, beta in ((1.0, -2.5), (0.5, 0.0), (numbers[0], numbers[1])):
        found = CpuProducts().product(p, q, r, alpha, beta)
        check(found, each(alpha, r).double() * exact + each(beta, r).double() * r.double())
        assert torch.equal(found[:, apart], found.mT[:, apart])
    for factor, ignored in ((1.0, 0.0), (1.0, 2.0), (0.5, 2.0), (numbers[0], 0.0)):
        check(CpuProducts().product(p, q, None, factor, ignored), each(factor, r).double() * exact)


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("rows", [69, 70])
def test_panels_compute_as_much_as_they_say(rows: int) -> None:
    p = torch.zeros(1, rows, rows)
    with FlopCounterMode(display=False) as counter:
        CpuProducts().product(p, p, p, 0.5, 1.0)
    fraction = CpuProducts().symmetric_fraction(rows, rows)
    assert fraction == (1.0 if rows == 69 else 5 / 8)
    with FlopCounterMode(display=False) as float16:
        CpuProducts().product(p.half(), p.half(), p.half(), 0.5, 1.0)
    assert float16.get_total_flops() == 2 * rows**3
    # The last panel is narrower here.
    assert counter.get_total_flops() / (2 * rows**3) == pytest.approx(fraction, rel=0.05)


@every_product
@every_dtype
@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (70, 75)])
def test_no_argument_is_written_to_and_no_result_shares_its_memory(
    shape: tuple[int, int], dtype: torch.dtype, products: Products
) -> None:
    x, p, q, r = operands(2, *shape, dtype)
    alpha, beta = torch.tensor([1.5, -0.3]), torch.tensor([0.2, 2.0])
    given = (x, p, q, r, alpha, beta)
    before = [(t.clone(), t._version) for t in given]
    results = [
        products.gram(x),
        products.multiply(p, x),
        products.add_product(x, p, 0.5),
        products.add_product(x, p, alpha),
        products.product(p, q, r, 0.5, 2.0),
        products.product(p, p, p, 0.5, 1.0),
        products.product(p, q, r, alpha, beta),
        products.product(p, q, None, 1.0, 0.0),
    ]
    for tensor, (copy, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version
    addresses = {t.untyped_storage().data_ptr() for t in given}
    assert addresses.isdisjoint(t.untyped_storage().data_ptr() for t in results)
    assert {t.dtype for t in results} == {dtype}


@every_product
@pytest.mark.parametrize("rows", [4, LOOP_ROWS])
def test_squares_stay_in_the_range_of_float16(rows: int, products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Frobenius norm of 32 in one singular value gives R = 1024, whose square overflows unless it is scaled."""
    assert HALF_SQUARE == 2**-5
    gram = torch.zeros(1, rows, rows, dtype=torch.float16)
    gram[0, 0, 0] = 1024.0
    square = products.product(gram, gram, None, HALF_SQUARE, 0.0)
    assert float(square[0, 0, 0]) == 2.0**15
    alpha, beta = torch.tensor([2.0**-20]), torch.tensor([2.0**-10])
    assert float(products.product(gram, gram, gram, alpha, beta)[0, 0, 0]) == 2.0
    # As on a device that multiplies float16 as it is.
    monkeypatch.setattr("distmuon.kernels.products.widened", lambda x: x.dtype)
    assert float(products.product(gram, gram, gram, alpha, beta)[0, 0, 0]) == 2.0


@pytest.mark.parametrize("products", ALL, ids=["torch", "cpu"])
@pytest.mark.parametrize("rows", [20, LOOP_ROWS])
def test_numbers_that_are_not_finite_reach_their_matrix_only(rows: int, products: Products) -> None:
    x, p, q, r = operands(3, rows, rows + 1, torch.bfloat16)
    good, bad = torch.tensor([1.0, 1.0, 0.5]), torch.tensor([1.0, torch.nan, 0.5])
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda a: products.product(p, q, r, a, good),
        lambda a: products.product(p, q, r, good, a),
        lambda a: products.add_product(x, p, a),
    ]
    for call in calls:
        found = call(bad)
        assert bool(found[1].isnan().all())
        assert torch.equal(found[[0, 2]], call(good)[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "fraction"),
    [
        (PANEL_ROWS, PANEL_INNER, 2 / 3),
        (PANEL_ROWS - 1, PANEL_INNER, 1.0),
        (PANEL_ROWS, PANEL_INNER - 1, 1.0),
        (4 * PANEL, 4 * PANEL, 1.0),
        (4 * PANEL, PANEL_INNER, 5 / 8),
    ],
)
def test_symmetric_fraction_is_what_is_multiplied(rows: int, inner: int, fraction: float, dtype: Any) -> None:
    assert (PANEL, PANEL_ROWS, PANEL_INNER, LOOP_ROWS) == (256, 768, 2048, 256)
    x = torch.zeros(1, rows, inner, dtype=dtype)
    choices: list[tuple[Products, float]] = [(CpuProducts(), fraction), (TorchProducts(), 1.0)]
    for products, expected in choices:
        assert products.symmetric_fraction(rows, inner) == expected
        with FlopCounterMode(display=False) as counter:
            products.gram(x)
        assert counter.get_total_flops() == 2 * rows**2 * inner * expected


@pytest.mark.parametrize(
    ("dtype", "shape", "wide"),
    [
        (torch.bfloat16, (16, 300), torch.float32),
        (torch.bfloat16, (300, 16), torch.float32),
        (torch.bfloat16, (17, 17), torch.bfloat16),
        (torch.float16, (300, 300), torch.float32),
        (torch.float32, (4, 4), torch.float32),
    ],
)
def test_what_is_widened(dtype: torch.dtype, shape: tuple[int, int], wide: torch.dtype) -> None:
    assert widened(torch.zeros(2, *shape, dtype=dtype)) == wide
    assert widened(torch.zeros(2, *shape, dtype=dtype, device="meta")) == dtype


def test_each() -> None:
    like = torch.zeros(3, 4, 5, dtype=torch.bfloat16)
    assert torch.equal(each(0.1, like), torch.full((3, 1, 1), 0.1))
    assert torch.equal(each(torch.tensor([1.0, 2.0, 3.0]), like), torch.tensor([[[1.0]], [[2.0]], [[3.0]]]))
