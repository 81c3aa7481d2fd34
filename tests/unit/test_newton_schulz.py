"""Orthogonalization against float64 and at the edges of its range."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distmuon.errors import ConfigError, DistMuonError, ParameterError
from distmuon.kernels.cpu import ALONE_ROWS
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz
from distmuon.published import PAPERS
from distmuon.schedule import flops
from tests import oracle
from tests.composed import composed

SHAPES = [(1, 1), (1, 12), (12, 1), (5, 7), (7, 5), (16, 16), (48, 96), (3, 8, 16), (2, 3, 9, 4)]
# Rounding of five iterations: fp16 stores 10 bits, bf16 stores 7, and a small singular value feels it most.
BANDS = {"float32": 2e-6, "float16": 0.008, "bfloat16": 0.06}
# Gram Newton-Schulz rounds more often before it multiplies X.
GRAM_BANDS = {"float32": 3e-5, "float16": 0.008, "bfloat16": 0.06}
WIDE = 24
LONG = 40
# Preset and form: one step at a time and several, both starts, odd and even numbers of steps.
FORMS = [("papers", "plain"), ("papers", "gram"), ("opt5", "plain"), ("opt5", "gram"), ("opt6", "gram")]
# The smallest matrices that a CPU combines one by one.
ALONE = (ALONE_ROWS, ALONE_ROWS + 1)
every_dtype = pytest.mark.parametrize("dtype", BANDS)
every_form = pytest.mark.parametrize(("preset", "form"), FORMS)


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def setting(dtype: str = "float32", steps: int | None = 5, **more: Any) -> NewtonSchulz:
    return NewtonSchulz.model_validate({"dtype": dtype, "steps": steps, **more})


def of_form(dtype: str, preset: str, form: str) -> NewtonSchulz:
    return setting(dtype, None, preset=preset, form=form)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], dtype: str) -> None:
    x = random(shape)
    found = orthogonalize(x, setting(dtype))
    assert found.shape == x.shape
    assert found.dtype == getattr(torch, dtype)
    assert oracle.relative(found, oracle.newton_schulz(x)) < BANDS[dtype]


@every_dtype
@pytest.mark.parametrize("shape", [(5, 7), (40, 24), (2, 3, 33, 64), ALONE])
@pytest.mark.parametrize(
    ("preset", "form"), [*FORMS, ("you", "plain"), ("papers8+2", "gram"), ("opt4", "plain"), ("opt6", "plain")]
)
def test_every_form_against_its_polynomials(shape: tuple[int, ...], dtype: str, preset: str, form: Any) -> None:
    x, ns = random(shape), of_form(dtype, preset, form)
    chosen = ns.polynomials(form)
    exact = composed(x, chosen.quintics, chosen.start)
    assert oracle.relative(orthogonalize(x, ns), exact) < GRAM_BANDS[dtype]


@every_dtype
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_a_list_of_cubics(form: str, dtype: str) -> None:
    """Where c is 0, the square of the Gram matrix must not be missed, nor come in."""
    cubics = [(1.5, -0.5, 0.0)] * 6
    x = random((33, 64))
    ns = setting(dtype, None, preset="custom", coefficients=tuple(cubics), form=form)
    assert oracle.relative(orthogonalize(x, ns), composed(x, cubics)) < GRAM_BANDS[dtype]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_number_of_steps(steps: int) -> None:
    x = random((6, 9))
    assert oracle.relative(orthogonalize(x, setting(steps=steps)), oracle.newton_schulz(x, steps=steps)) < 2e-6
    assert setting(steps=steps).polynomials("plain").quintics == (PAPERS,) * steps


def test_the_papers_triple() -> None:
    assert PAPERS == (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(6, 9), (9, 300)])
def test_default_settings(shape: tuple[int, int]) -> None:
    x = random(shape)
    assert torch.equal(orthogonalize(x), orthogonalize(x, setting("bfloat16", 5, preset="papers", form="auto")))


@pytest.mark.parametrize("shape", [(32, 128), (64, 96), (96, 64), (8, 500)])
def test_singular_values_of_random_matrices(shape: tuple[int, int]) -> None:
    """The band of the papers' triple: values end near 1, not at it."""
    sigma = torch.linalg.svdvals(orthogonalize(random(shape), setting()).double())
    assert float(sigma.min()) >= 0.68
    assert float(sigma.max()) <= 1.14


def test_singular_vectors_stay() -> None:
    x = random((16, 48))
    found = orthogonalize(x, setting()).double()
    exact = oracle.polar(x)
    product = found @ exact.mT
    assert torch.allclose(product, product.mT, atol=1e-5)
    assert oracle.relative(found, exact) < 0.3


@every_dtype
@every_form
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 5e37])
def test_tiny_and_huge_matrices(size: float, dtype: str, preset: str, form: Any) -> None:
    x, ns = random((12, 20)), of_form(dtype, preset, form)
    chosen = ns.polynomials(form)
    band = BANDS if form == "plain" else GRAM_BANDS
    assert oracle.relative(orthogonalize(x * size, ns), composed(x, chosen.quintics, chosen.start)) < band[dtype]


@pytest.mark.parametrize("size", [1e-300, 1e-60, 1e60, 1e300])
def test_float64_input_beyond_the_range_of_float32(size: float) -> None:
    x = random((12, 20)).double()
    assert oracle.relative(orthogonalize(x * size, setting()), oracle.newton_schulz(x)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_floating_input(dtype: torch.dtype) -> None:
    x = random((12, 20)).to(dtype)
    assert oracle.relative(orthogonalize(x, setting()), oracle.newton_schulz(x.double())) < 2e-6


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
@every_dtype
@every_form
def test_zeros_stay_zero(shape: tuple[int, ...], dtype: str, preset: str, form: str) -> None:
    found = orthogonalize(torch.zeros(shape), of_form(dtype, preset, form))
    assert torch.equal(found.float(), torch.zeros(shape))


@every_dtype
def test_zeros_stay_zero_where_subnormal_numbers_are_flushed(dtype: str) -> None:
    assert torch.set_flush_denormal(True)
    try:
        found = orthogonalize(torch.zeros(4, 6), setting(dtype))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.float(), torch.zeros(4, 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@every_dtype
@every_form
def test_a_bad_matrix_shows_and_leaves_others_alone(
    bad: float, shape: tuple[int, int], dtype: str, preset: str, form: str
) -> None:
    batch, ns = random((3, *shape)), of_form(dtype, preset, form)
    good = orthogonalize(batch, ns)
    if bad == 0:
        batch[1] = 0
    else:
        batch[1, 2, 3] = bad
    found = orthogonalize(batch, ns)
    assert torch.equal(found[1].isfinite(), torch.full(shape, bad == 0))
    assert torch.equal(found[[0, 2]], good[[0, 2]])


def test_a_matrix_that_is_not_finite_takes_no_longer() -> None:
    """Torch leaves its fast bfloat16 product for one of a hundred times the time where a factor is NaN."""
    x = random((512, 512))
    seconds = []
    for _ in range(2):
        start = time.thread_time()
        found = orthogonalize(x, setting("bfloat16"))
        seconds.append(time.thread_time() - start)
        x[2, 3] = float("nan")
    assert not found.isfinite().any()
    assert seconds[1] < 10 * seconds[0] + 0.2


class ProductNumbers(TorchDispatchMode):
    """Notes the numbers of every matrix product, beta and alpha among them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.rstrip("_") in ("mm", "bmm", "addmm", "addbmm", "baddbmm"):
            numbers = [n for n in args if not isinstance(n, Tensor)]
            numbers += [(key, n) for key, n in (kwargs or {}).items() if not isinstance(n, Tensor)]
            self.seen.append((name, *numbers))
        return func(*args, **(kwargs or {}))


@every_dtype
@every_form
@pytest.mark.parametrize("shape", [(2, 20, 36), ALONE])
def test_no_product_is_compiled_anew_for_an_input(shape: tuple[int, ...], dtype: str, preset: str, form: str) -> None:
    """oneDNN compiles a product for every beta and alpha that it meets: they must not depend on the matrices."""
    seen = []
    for size in (1.0, 1.3e-3, 777.0):
        with ProductNumbers() as numbers:
            orthogonalize((random(shape) * size).clamp(max=9).exp() - 1, of_form(dtype, preset, form))
        seen.append(numbers.seen)
    assert seen[0] == seen[1] == seen[2]
    assert any("baddbmm" in name and more for name, *more in seen[0])


@every_form
def test_the_shorter_side_is_multiplied(preset: str, form: Any) -> None:
    """Tall matrices are turned first: both take the operations of 24 x 40."""
    ns = of_form("bfloat16", preset, form)
    steps = len(ns.polynomials(form).quintics)
    segments = ns.gram_segments() if form == "gram" else (1,) * steps
    assert segments is not None
    for shape in ((LONG, WIDE), (WIDE, LONG)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(random(shape), ns)
        assert counter.get_total_flops() == flops(WIDE, LONG, segments, lambda rows, inner: 1.0)


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 4, 6), (0, 5), (5, 0), (2, 0, 5), (2, 5, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    found = orthogonalize(x, setting())
    assert found.shape == shape
    assert found.dtype == torch.float32
    assert found is not x


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.zeros(4), "a 1-D torch.float32 tensor"),
        (torch.tensor(1.0), "a 0-D torch.float32 tensor"),
        (torch.zeros(4, 4, dtype=torch.int64), "a 2-D torch.int64 tensor"),
        (torch.zeros(4, 4, dtype=torch.complex64), "a 2-D torch.complex64 tensor"),
    ],
)
def test_what_is_no_matrix(x: Tensor, found: str) -> None:
    with pytest.raises(ParameterError, match=found) as caught:
        orthogonalize(x)
    assert isinstance(caught.value, DistMuonError)
    assert isinstance(caught.value, ValueError)


def test_products_that_cannot_run_are_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTMUON_KERNELS", "cuda")
    with pytest.raises(ConfigError, match='DISTMUON_KERNELS = "cuda" is not legal'):
        orthogonalize(torch.zeros(4, 6))
    assert orthogonalize(torch.zeros(4, 6), setting(kernels="torch")).shape == (4, 6)
