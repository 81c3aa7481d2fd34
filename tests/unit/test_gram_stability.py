"""The Gram form stays in bounds where its rounding errors add up, also on products that mirror a triangle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmuon.coefficients import PresetName
from distmuon.iteration import Schedule, iterate
from distmuon.kernels.cpu import CpuProducts
from distmuon.kernels.products import Products, TorchProducts
from distmuon.newton_schulz import prescale
from distmuon.ns_settings import NewtonSchulz
from tests.mirrored import Mirrored


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_form(name: PresetName) -> Schedule:
    ns = NewtonSchulz(preset=name, form="gram")
    chosen, segments = ns.polynomials("gram"), ns.gram_segments()
    assert segments is not None
    return Schedule(chosen.quintics, segments, chosen.start)


def largest(x: Tensor, schedule: Schedule, products: Products) -> float:
    found = iterate(prescale(x, torch.bfloat16), schedule, products).float()
    return float(torch.linalg.matrix_norm(found, 2).max()) if found.isfinite().all() else float("inf")


@pytest.mark.parametrize("products", [TorchProducts(), CpuProducts(), Mirrored()], ids=["torch", "cpu", "mirrored"])
def test_dense_matrices_stay_in_bounds(products: Products) -> None:
    assert largest(random((1, 512, 512)), gram_form("opt5"), products) < 1.05


@pytest.mark.parametrize("name", ["opt5", "opt6"])
@pytest.mark.parametrize("products", [TorchProducts(), Mirrored()], ids=["torch", "mirrored"])
def test_sparse_matrices_stay_in_bounds(products: Products, name: PresetName) -> None:
    """Their products have few terms, whose rounding errors agree."""
    kept = random((40, 128, 128), 3).abs() > 2.5758
    assert 0.009 < float(kept.float().mean()) < 0.011
    assert largest(torch.where(kept, random((40, 128, 128), 4), 0.0), gram_form(name), products) < 1.1
