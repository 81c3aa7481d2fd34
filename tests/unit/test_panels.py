"""Panels of a CPU's symmetric products: their rounding and mirror images, and how much they compute."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distmuon.kernels import cpu
from distmuon.kernels.cpu import ALONE_ROWS, PANEL, PANEL_INNER, PANEL_ROWS, CpuProducts
from distmuon.kernels.products import Products, TorchProducts
from tests.unit.test_products import check, operands, random


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
    """One rounding; a mirror image outside the blocks on the diagonal."""
    _, p, q, r = operands(2, rows, 1, dtype)
    block = torch.arange(rows) // 20
    apart = block[:, None] != block
    # Rounded operands do not quite commute: what is above the diagonal blocks is the product from below them.
    exact = p.double() @ q.double()
    exact = torch.where(block[:, None] >= block, exact, exact.mT)
    R = r.double()
    for found, expected in (
        (CpuProducts().product(p, q), exact),
        (CpuProducts().square(r, 1.0), R @ R),
        (CpuProducts().square_norm(r, 1.0)[0], R @ R),
    ):
        check(found, expected)
        assert torch.equal(found[:, apart], found.mT[:, apart])
    # Elsewhere nothing is mirrored.
    check(CpuProducts().square(r, 0.5), 0.5 * R @ R)


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("rows", [69, 70])
def test_panels_compute_as_much_as_they_say(rows: int) -> None:
    p = torch.zeros(1, rows, rows)
    fraction = CpuProducts().symmetric_fraction(rows, rows)
    assert fraction == (1.0 if rows == 69 else 5 / 8)
    for call in (lambda p: CpuProducts().product(p, p), lambda p: CpuProducts().square(p, 1.0)):
        with FlopCounterMode(display=False) as counter:
            call(p)
        # The last panel is narrower here.
        assert counter.get_total_flops() / (2 * rows**3) == pytest.approx(fraction, rel=0.05)
        with FlopCounterMode(display=False) as float16:
            call(p.half())
        assert float16.get_total_flops() == 2 * rows**3


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
def test_symmetric_fraction_is_what_is_multiplied(rows: int, inner: int, fraction: float) -> None:
    assert (PANEL, PANEL_ROWS, PANEL_INNER, ALONE_ROWS) == (256, 768, 2048, 256)
    x = torch.zeros(1, rows, inner, dtype=torch.bfloat16)
    choices: list[tuple[Products, float]] = [(CpuProducts(), fraction), (TorchProducts(), 1.0)]
    for products, expected in choices:
        assert products.symmetric_fraction(rows, inner) == expected
        with FlopCounterMode(display=False) as counter:
            products.gram(x)
        assert counter.get_total_flops() == 2 * rows**2 * inner * expected
