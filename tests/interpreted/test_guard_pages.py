"""No kernel touches a byte outside its tensors: inputs and outputs lie against unreadable pages, in a child process.

Shapes: B matrices, N rows, K the side that a product sums over, M columns.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from distmuon.kernels import triton_ops
from tests.interpreted import checks
from tests.interpreted.checks import BRAIN, SINGLE, matrices, symmetric
from tests.interpreted.guard import GuardedOutputs, exit_code, guarded
from tests.interpreted.launchers import CONFIG, DESCRIPTOR, POINTER, TINY, launchers, takes

SCALARS = torch.tensor([[0.7, -1.3, 2.9], [-3.1, 0.4, -0.6]])
# The large and the smallest shapes in large tiles, two more in small ones.
SHAPES = {(200, 336): CONFIG, (1, 1): CONFIG, (3, 5): CONFIG, (65, 33): TINY, (72, 40): TINY}
CASES = [
    (variant, dtype, shape, side)
    for variant, dtype, shape, side in itertools.product(
        (POINTER, DESCRIPTOR), (BRAIN, SINGLE), SHAPES, ("before", "after")
    )
    if takes(variant, dtype, *shape) and (dtype == BRAIN or SHAPES[shape] is TINY)
]
cases = pytest.mark.parametrize(("variant", "dtype", "shape", "side"), CASES, ids=str)


@cases
def test_symmetric_product(variant: str, dtype: torch.dtype, shape: tuple[int, int], side: str) -> None:
    def child(with_c: bool) -> None:
        x = guarded(matrices(2, *shape, dtype), side)
        c = guarded(symmetric(2, shape[0], dtype), side) if with_c else None
        scalars = guarded(SCALARS, side)
        with GuardedOutputs(side) as outputs:
            y, sums = launchers(variant, SHAPES[shape]).symmetric_product_norm(x, x, c, scalars)
        assert outputs.made == 2
        exact = checks.symmetric_product(x, x, c, scalars)
        checks.assert_rounded_once(y, exact)
        torch.testing.assert_close(sums.double(), exact.square().sum(dim=(-2, -1)), rtol=1e-5, atol=0)

    assert exit_code(child, True) == 0
    if shape == (3, 5):
        assert exit_code(child, False) == 0


@cases
def test_add_product(variant: str, dtype: torch.dtype, shape: tuple[int, int], side: str) -> None:
    def child() -> None:
        x, p = guarded(matrices(2, *shape, dtype), side), guarded(matrices(2, shape[0], shape[0], dtype), side)
        scalars = guarded(SCALARS[:, :1].contiguous(), side)
        with GuardedOutputs(side) as outputs:
            y = launchers(variant, SHAPES[shape]).add_product(x, p, scalars)
        assert outputs.made == 1
        checks.assert_rounded_once(y, checks.add_product(x, p, scalars))

    assert exit_code(child) == 0


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
@pytest.mark.parametrize("length", [1, 5, 1023, 1024, 4097])
def test_momentum_cast(length: int, dtype: torch.dtype, side: str) -> None:
    def child() -> None:
        m, g = (guarded(torch.randn(length), side) for _ in range(2))
        with GuardedOutputs(side) as outputs:
            u, partials = triton_ops.momentum_cast(m, g, 0.9, True, dtype)
        assert outputs.made == 2
        assert bool(u.isfinite().all())
        assert checks.norm(partials) == pytest.approx(float(u.double().norm()), rel=1e-6)

    assert exit_code(child) == 0
