"""Matrix products on a CPU against float64: rounding, symmetry, numbers per matrix, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon.iteration import HALF_SQUARE
from distmuon.kernels import cpu
from distmuon.kernels.cpu import ALONE_ROWS, CpuProducts
from distmuon.kernels.products import Products, TorchProducts, row_squares, widened

# Half a unit in the last place relative to the largest binade, and float32 accumulation of what cancels.
ONE_ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
ACCUMULATION = 2e-6
ALL = [TorchProducts(), CpuProducts()]
# Smallest shapes of: widened bfloat16, one call per batch, one sum per matrix.
SHAPES = [(1, 3), (16, 20), (17, 40), (ALONE_ROWS, ALONE_ROWS + 1)]
# (a, b, c) of aI + bR + cR^2: plain steps, factors, cubics, and a that is far larger or smaller than the rest.
POLYNOMIALS = [
    (0.0, 2.5, 1.0),
    (1.5, -4.0, 0.3),
    (8.2, -0.01, 0.02),
    (1e-3, 1.0, -0.7),
    (1.5, -0.5, 0.0),
    (0.0, 2.0, 0.0),
]
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


def check(found: Tensor, exact: Tensor) -> None:
    """At most one rounding to the dtype."""
    ulp = ONE_ROUNDING[found.dtype]
    assert bool(((found.double() - exact).abs() <= ulp * exact.abs() + ACCUMULATION * exact.abs().amax()).all())


@every_product
@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_one_rounding(shape: tuple[int, int], dtype: torch.dtype, products: Products) -> None:
    x, p, q, r = operands(3, *shape, dtype)
    X, P, Q, R = (t.double() for t in (x, p, q, r))
    check(products.gram(x), X @ X.mT)
    check(products.multiply(q, x), Q @ X)
    check(products.add_product(x, p, -1.7), -1.7 * X + P @ X)
    check(products.product(p, q), P @ Q)
    for alpha in (1.0, HALF_SQUARE):
        check(products.square(r, alpha), alpha * R @ R)
        square, squares = products.square_norm(r, alpha)
        assert torch.equal(square, products.square(r, alpha))
        assert squares.dtype == torch.float64
        # Of the stored values, or of them before they are rounded.
        assert torch.allclose(squares, (alpha * R @ R).square().sum(dim=(1, 2)), rtol=2 * torch.finfo(dtype).eps + 4e-6)


@every_product
@every_dtype
@pytest.mark.parametrize("numbers", POLYNOMIALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_polynomials(
    shape: tuple[int, int], numbers: tuple[float, float, float], dtype: torch.dtype, products: Products
) -> None:
    r = operands(3, *shape, dtype)[3]
    a, b, c = numbers
    check(products.polynomial(r, a, b, c), polynomial(r, r.double() @ r.double(), *numbers))


def polynomial(r: Tensor, square: Tensor, a: Any, b: Any, c: Any) -> Tensor:
    return a * torch.eye(r.shape[-1], dtype=torch.float64) + b * r.double() + c * square


def half_unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What one rounding to nearest may add to each, not to the largest of its binade."""
    return torch.exp2(torch.floor(torch.log2(exact.abs()))) * torch.finfo(dtype).eps / 2


@every_product
@every_dtype
@pytest.mark.parametrize("numbers", [(8.2, -22.8, 16.4), (8.2, 0.31, -0.07), (1.9, -0.3, 0.0)])
@pytest.mark.parametrize("rows", [5, 16, 40, ALONE_ROWS])
def test_the_diagonal_of_a_polynomial_is_exact_to_one_rounding(
    rows: int, numbers: tuple[float, float, float], dtype: torch.dtype, products: Products
) -> None:
    """Where a >> b R, a sum of rounded numbers would be rounded twice, which adds up in a product of such factors."""
    r = (operands(3, rows, 1, torch.float32)[3] / 30).to(dtype)
    exact = polynomial(r, r.double() @ r.double(), *numbers).diagonal(dim1=1, dim2=2)
    found = products.polynomial(r, *numbers).diagonal(dim1=1, dim2=2).double()
    # Around the middle between two numbers, float32 sums decide.
    assert bool(((found - exact).abs() <= half_unit(exact, dtype) + 2.5e-7 * exact.abs()).all())


@every_product
@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_per_matrix(shape: tuple[int, int], dtype: torch.dtype, products: Products) -> None:
    """One rounding from float32, also where the numbers are given in float64."""
    _, _, s, r = operands(3, *shape, dtype)
    numbers = torch.tensor([[0.0, 2.3, -80.7], [1.5, -0.3, 1e-3], [-0.2, 7.0, 0.0]])
    exact = polynomial(r, s.double(), *numbers.double()[:, :, None, None])
    for one, y in zip(products.combine(r, s, *numbers.double()), exact, strict=True):
        check(one, y)


@every_product
@every_dtype
@pytest.mark.parametrize("rows", [1, 17, ALONE_ROWS - 1, ALONE_ROWS, ALONE_ROWS + 1])
def test_a_batch_is_combined_as_its_matrices_alone(rows: int, dtype: torch.dtype, products: Products) -> None:
    _, _, s, r = operands(5, rows, 1, dtype)
    numbers = random(3, 5).double()
    together = products.combine(r, s, *numbers)
    for i in range(5):
        alone = products.combine(r[i : i + 1], s[i : i + 1], *numbers[:, i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


@every_product
@every_dtype
@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 75)])
def test_no_argument_is_written_to_and_no_result_shares_its_memory(
    shape: tuple[int, int], panels: bool, dtype: torch.dtype, products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PANEL", "PANEL_ROWS", "PANEL_INNER"):
        monkeypatch.setattr(cpu, name, 20 if panels else getattr(cpu, name))
    x, p, q, r = operands(2, *shape, dtype)
    numbers = torch.tensor([[1.5, -0.3], [0.2, 2.0], [1.0, 0.0]]).double()
    given = (x, p, q, r, numbers)
    before = [(t.clone(), t._version) for t in given]
    results = [
        products.gram(x),
        products.multiply(p, x),
        products.multiply(p, q),
        products.add_product(x, p, 0.5),
        products.product(p, q),
        products.product(p, p),
        products.square(r, 1.0),
        products.square_norm(r, 0.5)[0],
        *(products.polynomial(r, *each) for each in POLYNOMIALS),
        products.combine(r, q, *numbers),
        products.combine(r, r, *numbers),
    ]
    for tensor, (copy, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version
    addresses = {t.untyped_storage().data_ptr() for t in given}
    assert addresses.isdisjoint(t.untyped_storage().data_ptr() for t in results)
    assert {t.dtype for t in results} == {dtype}


@every_product
@pytest.mark.parametrize("rows", [4, ALONE_ROWS])
def test_squares_stay_in_the_range_of_float16(rows: int, products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Frobenius norm of 32 in one singular value gives R = 1024, whose square overflows unless it is scaled."""
    assert HALF_SQUARE == 2**-5
    gram = torch.zeros(1, rows, rows, dtype=torch.float16)
    gram[0, 0, 0] = 1024.0
    numbers = torch.tensor([[0.5], [2.0**-10], [2.0**-15]]).double()
    for _ in range(2):
        square, squares = products.square_norm(gram, HALF_SQUARE)
        assert float(square[0, 0, 0]) == float(products.square(gram, HALF_SQUARE)[0, 0, 0]) == 2.0**15
        assert float(squares) == pytest.approx(2.0**30, rel=1e-6)
        assert float(products.combine(gram, square, *numbers)[0, 0, 0]) == 2.5
        # As on a device that multiplies float16 as it is.
        monkeypatch.setattr("distmuon.kernels.products.widened", lambda x: x.dtype)


@every_product
@pytest.mark.parametrize("rows", [20, ALONE_ROWS])
def test_numbers_that_are_not_finite_reach_their_matrix_only(rows: int, products: Products) -> None:
    _, _, s, r = operands(3, rows, 1, torch.bfloat16)
    good = torch.tensor([[1.0, 1.0, 0.5]] * 3)
    expected = products.combine(r, s, *good)
    for i in range(3):
        bad = good.clone()
        bad[i, 1] = torch.nan
        found = products.combine(r, s, *bad)
        # The first stands on the diagonal only.
        assert bool((found[1] if i else found[1].diagonal()).isnan().all())
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


@every_product
@every_dtype
def test_a_matrix_that_is_not_finite_shows_in_its_norm(dtype: torch.dtype, products: Products) -> None:
    r = operands(3, 20, 1, dtype)[3]
    r[1, 2, 3] = r[1, 3, 2] = torch.nan
    _, squares = products.square_norm(r, 1.0)
    assert squares.isnan().tolist() == [False, True, False]


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


@every_dtype
def test_row_squares(dtype: torch.dtype) -> None:
    r = operands(3, 40, 1, dtype)[3]
    found = row_squares(r)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), r.double().square().sum(dim=-1), rtol=1e-6, atol=0)
