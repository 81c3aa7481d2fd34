"""add_product against float64: both variants of the kernel, and the twin.

Shapes: B matrices, N rows, M columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distmuon.kernels.tuning import Config
from tests.interpreted import checks
from tests.interpreted.checks import BRAIN, HALF, SINGLE, every_view, matrices
from tests.interpreted.interpreter import shuffled
from tests.interpreted.launchers import CONFIG, EVERY, KERNELS, TINY, TWIN, launchers, takes

Figure = Callable[[str], None]
SHAPES = [(1, 1), (1, 8), (8, 8), (130, 72), (257, 40), (64, 64), (128, 200), (40, 257)]
SCALARS = torch.tensor([[0.7], [-3.1], [0.0]])
every = pytest.mark.parametrize("variant", EVERY)
kernels = pytest.mark.parametrize("variant", KERNELS)


def run(variant: str, x: Tensor, p: Tensor, scalars: Tensor, config: Config = CONFIG) -> Tensor:
    """The launcher, with every promise that holds for all inputs checked."""
    given = (x, p, scalars)
    copies = [tensor.clone() for tensor in given]
    y = launchers(variant, config).add_product(*given)
    for tensor, copy in zip(given, copies, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    assert y.dtype == x.dtype
    return y


def check(variant: str, x: Tensor, p: Tensor, scalars: Tensor, config: Config = CONFIG) -> None:
    checks.assert_rounded_once(run(variant, x, p, scalars, config), checks.add_product(x, p, scalars))


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    ("variant", "dtype", "shape"),
    [(v, d, s) for v in EVERY for d in (BRAIN, HALF, SINGLE) for s in SHAPES if takes(v, d, *s)],
    ids=str,
)
def test_every_shape(variant: str, dtype: torch.dtype, shape: tuple[int, int], figure: Figure) -> None:
    x, p = matrices(2, *shape, dtype), matrices(2, shape[0], shape[0], dtype)
    worst = checks.assert_rounded_once(run(variant, x, p, SCALARS[:2]), checks.add_product(x, p, SCALARS[:2]))
    figure(f"aX + PX, {variant}, {dtype}: within {worst:.2f} of the rounding of the float64 result")


@kernels
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("a", [-1.7, 0.0, 1.0])
def test_every_batch(batch: int, a: float, variant: str) -> None:
    check(variant, matrices(batch, 72, 136, BRAIN), matrices(batch, 72, 72, BRAIN), torch.tensor([a]))


@kernels
@pytest.mark.parametrize("config", [TINY, Config(32, 128, 64, 4, 2, 3), Config(128, 64, 128, 8, 3)], ids=str)
def test_every_size_of_tiles(config: Config, variant: str) -> None:
    check(variant, matrices(1, 104, 72, HALF), matrices(1, 104, 104, HALF), SCALARS[:1], config)


@kernels
def test_the_order_of_the_programs_does_not_matter(variant: str) -> None:
    x, p = matrices(2, 136, 72, BRAIN), matrices(2, 136, 136, BRAIN)
    y = run(variant, x, p, SCALARS[:2])
    for seed in (1, 2, 3):
        with shuffled(seed):
            assert torch.equal(y, run(variant, x, p, SCALARS[:2]))


@kernels
def test_a_matrix_gets_the_same_bits_in_any_batch(variant: str) -> None:
    x, p = matrices(3, 72, 136, BRAIN), matrices(3, 72, 72, BRAIN)
    y = run(variant, x, p, SCALARS)
    for i in range(3):
        assert torch.equal(run(variant, x[i : i + 1], p[i : i + 1], SCALARS[i])[0], y[i])


@every
@every_view
def test_strides_change_no_bits(view: Callable[[Tensor], Tensor], variant: str) -> None:
    x, p = matrices(2, 72, 40, BRAIN), matrices(2, 72, 72, BRAIN)
    table = SCALARS[:2].repeat_interleave(2, dim=0)[::2]
    assert torch.equal(run(variant, view(x), view(p), table), run(variant, x, p, SCALARS[:2]))


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_column(value: float, variant: str) -> None:
    x, p = matrices(2, 72, 136, BRAIN), matrices(2, 72, 72, BRAIN)
    x[1, 70, 71] = value
    bad = torch.zeros(2, 72, 136, dtype=torch.bool)
    bad[1, :, 71] = True
    assert torch.equal(~run(variant, x, p, SCALARS[:2]).isfinite(), bad)


@every
def test_the_result_is_new_memory(variant: str) -> None:
    x, p = matrices(2, 72, 72, BRAIN), matrices(2, 72, 72, BRAIN)
    y = launchers(variant).add_product(x, p, SCALARS[:2])
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (x, p)}


@pytest.mark.fault("F17")
@kernels
@pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
def test_nearly_every_bit_is_that_of_the_twin(dtype: torch.dtype, variant: str, figure: Figure) -> None:
    x, p = matrices(2, 200, 104, dtype), matrices(2, 200, 200, dtype)
    y, twin = run(variant, x, p, SCALARS[:2]), run(TWIN, x, p, SCALARS[:2])
    equal, off = float((y == twin).float().mean()), checks.ulps(y, twin)
    figure(f"aX + PX, {variant}, {dtype}: at most {off:.2g} ulp from the twin, {equal:.3f} of all elements equal")
    if dtype != SINGLE:
        assert off <= 2
        assert equal > 0.99
    largest = float(twin.abs().max())
    torch.testing.assert_close(y, twin, rtol=2 * checks.ROUNDOFF[dtype], atol=2 * checks.ACCUMULATION * largest)
