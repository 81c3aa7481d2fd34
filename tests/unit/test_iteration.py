"""The iteration: all arrangements of segments against their polynomials, starting scales, and what keeps it stable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon.coefficients import GRAM_MARGIN, Quintic, Start, preset
from distmuon.iteration import SCHATTEN_MARGIN, SMALLEST_NORM, Schedule, frobenius_scale, iterate, schatten8_scale
from distmuon.kernels.cpu import CpuProducts
from distmuon.kernels.products import HALF_SQUARE, Products, Scalar, TorchProducts
from distmuon.newton_schulz import prescale
from tests import oracle
from tests.composed import composed, start_norm

# No two steps alike, none even nearly orthogonalizing: a step left out, doubled or exchanged shows.
QUINTICS: tuple[Quintic, ...] = (
    (3.0, -4.0, 2.0),
    (1.7, -0.9, 0.2),
    (1.2, 0.3, -0.4),
    (2.0, -1.5, 0.5),
    (0.8, 0.1, 0.05),
)
STARTS: tuple[Start, ...] = ("frobenius", "schatten8")
# Every way to cut four steps, and some cuts of five.
CUTS = [
    (1, 1, 1, 1),
    (1, 1, 2),
    (1, 2, 1),
    (2, 1, 1),
    (2, 2),
    (1, 3),
    (3, 1),
    (4,),
    (1, 2, 2),
    (2, 2, 1),
    (2, 3),
    (3, 2),
]
# Rounding to 10 and to 7 bits.
BANDS = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spectra(rows: int, cols: int) -> Tensor:
    """Matrices with few large, with equal, and with one singular value, of several sizes; [5, rows, cols]."""
    left = torch.linalg.qr(random((rows, rows), 1).double())[0]
    right = torch.linalg.qr(random((cols, rows), 2).double())[0].mT
    index = torch.arange(1, rows + 1).double()
    sigma = torch.stack([1 / index, torch.ones(rows), 0.01 + (index == 1), 2.0 ** -index.clamp(max=12), index])
    return torch.matmul(left * sigma.unsqueeze(-2), right).float()


@pytest.mark.parametrize("segments", CUTS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("shape", [(24, 40), (17, 17), (7, 300), (1, 5)])
def test_any_segments_compose_the_same_polynomials(
    shape: tuple[int, int], dtype: torch.dtype, start: Start, segments: tuple[int, ...]
) -> None:
    x = spectra(*shape)
    quintics = QUINTICS[: sum(segments)]
    found = iterate(prescale(x, dtype), Schedule(quintics, segments, start), TorchProducts())
    assert found.dtype == dtype
    for one, exact in zip(found, composed(x, quintics, start), strict=True):
        assert oracle.relative(one, exact) < BANDS[dtype]


@pytest.mark.parametrize("segments", [(1, 1, 1), (1, 2), (3,)])
@pytest.mark.parametrize("start", STARTS)
def test_matrices_that_a_cpu_computes_one_by_one(segments: tuple[int, ...], start: Start) -> None:
    x = torch.cat([random((2, 256, 260)), 30 * random((1, 256, 260), 1)])
    exact = composed(x, QUINTICS[:3], start)
    for dtype in (torch.float32, torch.bfloat16):
        found = iterate(prescale(x, dtype), Schedule(QUINTICS[:3], segments, start), CpuProducts())
        assert oracle.relative(found, exact) < BANDS[dtype]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("segments", [(1, 1), (2,), (2, 2)])
def test_cubics(start: Start, segments: tuple[int, ...]) -> None:
    cubics = ((1.5, -0.5, 0.0), (1.2, -0.2, 0.0), (1.4, -0.4, 0.0), (1.3, -0.3, 0.0))[: sum(segments)]
    x = spectra(24, 40)
    for dtype, band in BANDS.items():
        found = iterate(prescale(x, dtype), Schedule(cubics, segments, start), TorchProducts())
        assert oracle.relative(found, composed(x, cubics, start)) < band


@pytest.mark.parametrize("segments", [(1, 1, 1), (1, 2), (3,)])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", BANDS)
def test_nothing_is_written_to(dtype: torch.dtype, start: Start, segments: tuple[int, ...]) -> None:
    x = prescale(random((2, 8, 12)), dtype)
    before, version = x.clone(), x._version
    found = iterate(x, Schedule(QUINTICS[:3], segments, start), TorchProducts())
    assert torch.equal(x, before)
    assert x._version == version
    assert found.data_ptr() != x.data_ptr()


class Counting(TorchProducts):
    """Notes which products are asked for."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def gram(self, x_BMN: Tensor) -> Tensor:
        self.seen.append("gram")
        return super().gram(x_BMN)

    def product(self, *args: Any) -> Tensor:
        self.seen.append("product")
        return super().product(*args)

    def multiply(self, q_BMM: Tensor, x_BMN: Tensor) -> Tensor:
        self.seen.append("QX")
        return super().multiply(q_BMM, x_BMN)

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: Scalar) -> Tensor:
        self.seen.append("aX+PX")
        return super().add_product(x_BMN, p_BMM, a)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("segments", CUTS)
def test_no_product_more_than_needed(start: Start, segments: tuple[int, ...]) -> None:
    products = Counting()
    x = prescale(random((2, 8, 12)), torch.float32)
    iterate(x, Schedule(QUINTICS[: sum(segments)], segments, start), products)
    expected: list[str] = []
    for length in segments:
        expected += ["gram", *["product"] * (4 * length - 3)]
        # One step rounds less as aX + PX; where the scale comes from R^2, it is folded into Q.
        folded = len(expected) == 2 and start == "schatten8"
        expected.append("aX+PX" if length == 1 and not folded else "QX")
    assert products.seen == expected


@pytest.mark.parametrize(("start", "squares"), [("frobenius", 0), ("schatten8", 1)])
def test_cubics_take_no_square_but_for_their_norm(start: Start, squares: int) -> None:
    x, cubic = prescale(random((2, 8, 12)), torch.float32), (1.5, -0.5, 0.0)
    for segments in ((1, 1, 1), (1, 2), (3,)):
        products = Counting()
        iterate(x, Schedule((cubic,) * 3, segments, start), products)
        assert products.seen.count("product") == 3 * (3 - len(segments)) + squares


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("shape", [(24, 40), (3, 3), (1, 7), (64, 64)])
def test_frobenius_scale_is_one_over_the_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = prescale(spectra(*shape), dtype)
    found = frobenius_scale(TorchProducts().gram(x))
    norms = x.double().square().sum(dim=(1, 2)).sqrt()
    assert found.dtype == torch.float64
    traces = TorchProducts().gram(x).double().diagonal(dim1=1, dim2=2).sum(dim=1)
    assert torch.allclose(found, 1 / traces.sqrt(), rtol=1e-14, atol=0)
    # The diagonal of R is rounded.
    assert torch.allclose(found * norms, torch.ones_like(norms), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("shape", [(24, 40), (3, 3), (1, 7), (64, 64), (128, 512)])
def test_schatten8_scale_keeps_every_singular_value_below_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = prescale(torch.cat([spectra(*shape), random((3, *shape), 5)]), dtype)
    stored = HALF_SQUARE if dtype == torch.float16 else 1.0
    gram = TorchProducts().gram(x)
    found = schatten8_scale(TorchProducts().product(gram, gram, None, stored, 0.0), stored)
    sigma = torch.linalg.svdvals(x.double())
    largest = found * sigma[:, 0]
    assert bool((largest <= 1).all())
    assert bool((largest >= shape[0] ** -0.125 / SCHATTEN_MARGIN * 0.998).all())
    tolerance = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert torch.allclose(found * start_norm(sigma, "schatten8").squeeze(-1), torch.ones_like(found), rtol=tolerance)
    # Never looser than the Frobenius norm but for the margin; twice as tight and more where many values are alike.
    frobenius = frobenius_scale(gram)
    assert bool((found * SCHATTEN_MARGIN >= frobenius * 0.998).all())
    if shape[0] >= 24:
        assert bool((found[[1, 4, 5, 6, 7]] > 2 * frobenius[[1, 4, 5, 6, 7]]).all())


def test_the_margin_of_the_schatten_norm() -> None:
    assert SCHATTEN_MARGIN == 1.005
    square = torch.eye(1).expand(2, 1, 1)
    assert schatten8_scale(square).tolist() == pytest.approx([1 / 1.005] * 2, rel=1e-12)
    assert schatten8_scale(square * 16).tolist() == pytest.approx([0.5 / 1.005] * 2, rel=1e-12)
    assert schatten8_scale(square * 16 * 2**-5, 2**-5).tolist() == pytest.approx([0.5 / 1.005] * 2, rel=1e-12)


@pytest.mark.parametrize("dtype", BANDS)
def test_scales_of_zero_and_of_nan(dtype: torch.dtype) -> None:
    gram = torch.zeros(2, 4, 4, dtype=dtype)
    gram[1, 2, 2] = torch.nan
    for scale in (frobenius_scale(gram), schatten8_scale(gram)):
        assert scale.isfinite().tolist() == [True, False]
        assert float(scale[0] ** 5) < torch.finfo(torch.float32).max / 100
        assert float(scale[0]) * 10 < torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", BANDS)
def test_no_matrix_but_zero_is_below_the_smallest_norm(dtype: torch.dtype) -> None:
    """A single element in the longest row is the least that prescaling leaves."""
    x = torch.zeros(1, 1, 2**20)
    x[0, 0, 3] = 1.0
    assert float(prescale(x, dtype).float().norm()) > 2 * SMALLEST_NORM[dtype]


class Transposed(TorchProducts):
    """P Q^T instead of P Q: the same where Q is symmetric bit for bit."""

    def product(self, p_BMM: Tensor, q_BMM: Tensor, r_BMM: Tensor | None, alpha: Scalar, beta: Scalar) -> Tensor:
        return super().product(p_BMM, q_BMM.mT.contiguous(), r_BMM, alpha, beta)


def test_products_with_a_transposed_operand_diverge() -> None:
    """The reason for P Q: rounding makes Q unsymmetric, and Q^T feeds the difference back."""
    chosen = preset("opt5", margin=GRAM_MARGIN)
    schedule = Schedule(chosen.quintics, (1, 2, 2), chosen.start)
    x = prescale(random((1, 512, 512)), torch.bfloat16)

    def largest(products: Products) -> float:
        return float(torch.linalg.matrix_norm(iterate(x, schedule, products).float(), 2))

    assert largest(TorchProducts()) < 1.05
    assert largest(CpuProducts()) < 1.05
    assert largest(Transposed()) > 10
