"""Orthogonalization against float64, at the edges of its range, and bit for bit where that is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon.coefficients import PAPERS, coefficients
from distmuon.config import NewtonSchulz
from distmuon.errors import DistMuonError, ParameterError
from distmuon.newton_schulz import normalize, orthogonalize
from tests import oracle

SHAPES = [(1, 1), (1, 12), (12, 1), (5, 7), (7, 5), (16, 16), (48, 96), (3, 8, 16), (2, 3, 9, 4)]
# Rounding of five iterations: fp16 stores 10 bits, bf16 stores 7, and a small singular value feels it most.
BANDS = {"float32": 2e-6, "float16": 0.008, "bfloat16": 0.06}
WIDE = 24
LONG = 40


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def setting(dtype: str = "float32", steps: int = 5) -> NewtonSchulz:
    return NewtonSchulz.model_validate({"dtype": dtype, "steps": steps})


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], dtype: str) -> None:
    x = random(shape)
    found = orthogonalize(x, setting(dtype))
    assert found.shape == x.shape
    assert found.dtype == getattr(torch, dtype)
    assert oracle.relative(found, oracle.newton_schulz(x)) < BANDS[dtype]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_number_of_steps(steps: int) -> None:
    x = random((6, 9))
    assert oracle.relative(orthogonalize(x, setting(steps=steps)), oracle.newton_schulz(x, steps=steps)) < 2e-6
    assert coefficients(setting(steps=steps)) == (PAPERS,) * steps


def test_the_papers_triple() -> None:
    assert PAPERS == (3.4445, -4.7750, 2.0315)


def test_default_settings() -> None:
    x = random((6, 9))
    assert torch.equal(orthogonalize(x), orthogonalize(x, setting("bfloat16", 5)))


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


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (5, 7), (12, 12), (1, 9), (33, 65)])
def test_a_batch_is_the_loop_bit_for_bit(shape: tuple[int, int], dtype: str) -> None:
    for count in (1, 2, 5, 16):
        batch = random((count, *shape), seed=count)
        together = orthogonalize(batch, setting(dtype))
        alone = torch.stack([orthogonalize(x, setting(dtype)) for x in batch])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("shape", [(12, 16), (16, 16), (16, 64), (12, 64), (8, 128)])
def test_small_matrices_have_the_same_bits_in_a_batch(shape: tuple[int, int], dtype: str) -> None:
    """A CPU picks its 16-bit kernel by the size of the whole batch; that must not show. It seldom does: try many."""
    found = {seed: random((16, *shape), seed) for seed in range(10, 32)}
    alone = {s: torch.stack([orthogonalize(x, setting(dtype)) for x in batch]) for s, batch in found.items()}
    assert [s for s, batch in found.items() if not torch.equal(orthogonalize(batch, setting(dtype)), alone[s])] == []


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("power", [-60, -7, 1, 40])
def test_powers_of_two_do_not_change_a_bit(power: int, dtype: str) -> None:
    x = random((12, 20))
    assert torch.equal(orthogonalize(x * 2.0**power, setting(dtype)), orthogonalize(x, setting(dtype)))


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 5e37])
def test_tiny_and_huge_matrices(size: float, dtype: str) -> None:
    x = random((12, 20))
    assert oracle.relative(orthogonalize(x * size, setting(dtype)), oracle.newton_schulz(x)) < BANDS[dtype]


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_float64_input_beyond_the_range_of_float32(size: float) -> None:
    x = random((12, 20)).double()
    assert oracle.relative(orthogonalize(x * size, setting()), oracle.newton_schulz(x)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_floating_input(dtype: torch.dtype) -> None:
    x = random((12, 20)).to(dtype)
    assert oracle.relative(orthogonalize(x, setting()), oracle.newton_schulz(x.double())) < 2e-6


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
@pytest.mark.parametrize("dtype", BANDS)
def test_zeros_stay_zero(shape: tuple[int, ...], dtype: str) -> None:
    assert torch.equal(orthogonalize(torch.zeros(shape), setting(dtype)).float(), torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", BANDS)
def test_one_bad_element_shows_and_leaves_other_matrices_alone(bad: float, dtype: str) -> None:
    batch = random((3, 4, 6))
    good = orthogonalize(batch, setting(dtype))
    batch[1, 2, 3] = bad
    found = orthogonalize(batch, setting(dtype))
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 5, 5)])
def test_the_input_is_never_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(shape).to(dtype)
    before, version = x.clone(), x._version
    for ns in ("float32", "bfloat16"):
        found = orthogonalize(x, setting(ns))
        assert torch.equal(x, before)
        assert x._version == version
        assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("shape", [(WIDE, LONG), (5, 7), (1, 9)])
def test_tall_is_the_transpose_of_wide(shape: tuple[int, int], dtype: str) -> None:
    wide = random(shape)
    tall = wide.mT.contiguous()
    assert oracle.relative(orthogonalize(tall, setting(dtype)), orthogonalize(wide, setting(dtype)).mT) < BANDS[dtype]


def test_the_shorter_side_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tall matrices are turned first: the Gram matrix is 24 x 24 both times."""
    seen: list[tuple[int, ...]] = []
    bmm = torch.bmm

    def watch(first: Tensor, second: Tensor, *args: Any) -> Tensor:
        product = bmm(first, second, *args)
        seen.append(tuple(product.shape))
        return product

    monkeypatch.setattr(torch, "bmm", watch)
    for shape in ((LONG, WIDE), (WIDE, LONG)):
        orthogonalize(random(shape), setting())
    assert set(seen) == {(1, WIDE, WIDE)}


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 4, 6), (0, 5), (5, 0), (2, 0, 5), (2, 5, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    found = orthogonalize(torch.zeros(shape), setting())
    assert found.shape == shape
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.zeros(4), "a 1-D torch.float32 tensor"),
        (torch.tensor(1.0), "a 0-D torch.float32 tensor"),
        (torch.zeros(4, 4, dtype=torch.int64), "a 2-D torch.int64 tensor"),
    ],
)
def test_what_is_no_matrix(x: Tensor, found: str) -> None:
    with pytest.raises(ParameterError, match=found) as caught:
        orthogonalize(x)
    assert isinstance(caught.value, DistMuonError)
    assert isinstance(caught.value, ValueError)


def test_normalize() -> None:
    x = random((4, 6, 8)) * torch.tensor([1e-30, 1.0, 1e30, 0.0]).view(4, 1, 1)
    found = normalize(x)
    assert found.dtype == torch.float32
    norms = found.double().square().sum(dim=(1, 2)).sqrt()
    assert torch.allclose(norms, torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), atol=1e-6)
    assert torch.equal(normalize(x[1:2].bfloat16()), normalize(x[1:2].bfloat16().float()))


@pytest.mark.parametrize("shape", [(33, 65), (65, 33), (7, 700), (128, 256)])
def test_normalize_does_not_depend_on_the_layout(shape: tuple[int, int]) -> None:
    for seed in range(10):
        x = random((3, *shape), seed)
        assert torch.equal(normalize(x.mT.contiguous()).mT, normalize(x))


def test_normalize_does_not_depend_on_the_batch() -> None:
    x = random((64, 33, 65))
    assert torch.equal(normalize(x), torch.cat([normalize(one[None]) for one in x]))
