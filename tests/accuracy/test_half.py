"""float16 stores X at a norm where XX^T and its square neither underflow nor overflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmuon.iteration import Schedule, iterate
from distmuon.kernels.products import TorchProducts
from distmuon.newton_schulz import orthogonalize, prescale
from tests.accuracy.judged import largest_sigma, random, setting


class Recorded(TorchProducts):
    """Keeps XX^T and its square."""

    def __init__(self) -> None:
        self.products: list[Tensor] = []

    def gram(self, x_BMN: Tensor) -> Tensor:
        self.products.append(super().gram(x_BMN))
        return self.products[-1]

    def square(self, r_BMM: Tensor, alpha: float) -> Tensor:
        self.products.append(super().square(r_BMM, alpha))
        return self.products[-1]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_little_of_the_square_underflows_at_2048_rows(scale: float) -> None:
    recorded = Recorded()
    schedule = Schedule(setting("opt5").polynomials("plain").quintics[:1], (1,), "schatten8")
    x = prescale(random(1, 2048, 2048) * scale, torch.float16)
    iterate(x, schedule, recorded)
    gram, square = recorded.products[:2]
    for product in (gram, square):
        assert product.dtype == torch.float16
        assert product.isfinite().all()
    assert float((square == 0).float().mean()) < 0.01
    exact = x[0].double() @ x[0].double().mT
    assert float((gram[0].double() - exact).norm() / exact.norm()) < 5e-4


def test_a_norm_of_one_would_underflow() -> None:
    """What the scale is for."""
    x = (random(2048, 2048) / 2048).half().float()
    gram = (x @ x.mT).half().float()
    assert float(((gram @ gram).half() == 0).float().mean()) > 0.9


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("shape", [(4, 4), (64, 64), (64, 2048)])
def test_equal_singular_values_do_not_overflow(shape: tuple[int, int], form: str) -> None:
    """The largest norm that XX^T and its square can have: all of X in one direction, or spread evenly."""
    for x in (torch.ones(shape), torch.eye(*shape), torch.full(shape, 65504.0), torch.eye(*shape) * 1e30):
        found = orthogonalize(x, setting("opt6", form, "float16"))
        assert abs(largest_sigma(found) - 1) < 0.01
