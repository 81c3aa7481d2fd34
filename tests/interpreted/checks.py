"""The oracle: every product in float64 from its formula, and how far one rounding may be from it.

Shapes: B matrices, N rows, K the side that a product sums over, M columns.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Unit roundoff: one rounding to nearest is at most this far off, relative to the exact value.
ROUNDOFF = {BRAIN: 2**-8, HALF: 2**-11, SINGLE: 2**-24}
# Float32 sums of up to 1024 products err by about sqrt(1024) 2^-24 = 1.9e-6 of their magnitude, whatever their order.
# Tensor-float-32 operands would be 2^-11 = 5e-4 off, a product summed in 16 bits more.
ACCUMULATION = 2e-6


def assert_rounded_once(y: Tensor, exact: Tensor) -> float:
    """Every element is within one rounding of the exact one; what was never written holds NaN and is not.

    Returns the largest distance in units of that bound.
    """
    assert exact.dtype == torch.float64
    assert y.shape == exact.shape
    if y.numel() == 0:
        return 0.0
    bound = ROUNDOFF[y.dtype] * exact.abs() + ACCUMULATION * exact.abs().amax(dim=(-2, -1), keepdim=True)
    excess = (y.double() - exact).abs() / bound
    worst = excess.nan_to_num(torch.inf).argmax()
    at = tuple(int(i) for i in torch.unravel_index(worst, y.shape))
    assert bool((excess <= 1).all()), f"{y[at]} at {at}, exactly {exact[at]}: {excess[at]:.3g} times the bound"
    return float(excess.max())


def ulps(y: Tensor, other: Tensor) -> float:
    """Largest distance of two results, in units in the last place of their largest element."""
    largest = float(other.double().abs().max())
    return float((y.double() - other.double()).abs().max()) / (power_of_two(largest) * 2 * ROUNDOFF[y.dtype])


def symmetric_product(a: Tensor, b: Tensor, c: Tensor | None, scalars: Tensor) -> Tensor:
    alpha, beta, gamma = scalars.double().expand(a.shape[0], 3)[:, :, None, None].unbind(1)
    y = alpha * (a.double() @ b.double().mT) + gamma * torch.eye(a.shape[1], dtype=torch.float64)
    return y if c is None else y + beta * c.double()


def add_product(x: Tensor, p: Tensor, scalars: Tensor) -> Tensor:
    return scalars.double().expand(x.shape[0], 1)[:, :, None] * x.double() + p.double() @ x.double()


def norm(partials: Tensor) -> float:
    """Norm of u from the parts of its blocks; NaN or infinity when u holds one."""
    total = 0.0
    for largest, squares in partials.tolist():
        if not math.isfinite(largest):
            return largest
        total += squares * power_of_two(largest) ** 2
    return math.sqrt(total)


def power_of_two(largest: float) -> float:
    """Largest power of two up to a finite value, at least the least normal float32."""
    return max(math.ldexp(1.0, math.frexp(largest)[1] - 1), 2.0**-126)


def matrices(batch: int, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal elements."""
    generator = torch.Generator().manual_seed(seed + 1000003 * rows + 1009 * columns + batch)
    return torch.randn(batch, rows, columns, generator=generator).to(dtype)


def symmetric(batch: int, rows: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Exactly symmetric matrices of standard normal elements."""
    x = matrices(batch, rows, rows, dtype, seed)
    return x.tril() + x.tril(-1).mT


def pair(batch: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Different A and B with an exactly symmetric A B^T = X D X^T, D of signed powers of two."""
    x = matrices(batch, rows, columns, dtype)
    powers = torch.tensor([1.0, -2.0, 0.5, -1.0, 4.0], dtype=dtype).repeat(columns)[:columns]
    return x * powers, x


# The same values with other strides and alignments.
every_view = pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
        lambda x: torch.cat([x, x], dim=-2)[..., : x.shape[-2], :],
        lambda x: torch.cat([x[..., :1], x], dim=-1)[..., 1:],
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    ],
    ids=["transposed", "long rows", "far apart", "rows off 16 bytes", "every second"],
)
