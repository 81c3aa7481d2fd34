"""What holds bit for bit for every preset, form and precision."""

from __future__ import annotations

import pytest
import torch

from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz
from tests.accuracy.judged import random, setting

PLAIN = ["papers", "you", "polar_express", "cans", "cubic5", "papers8+2", "opt4", "opt5", "opt6"]
GRAM = ["papers", "papers8+2", "opt4", "opt5", "opt6"]
METHODS = [
    pytest.param(setting(name, form, dtype), id=f"{name}-{form}-{dtype}")
    for form, names in (("plain", PLAIN), ("gram", GRAM), ("auto", ["papers", "opt5"]))
    for name in names
    for dtype in ("bfloat16", "float16", "float32")
]
# One shape of each way that a CPU multiplies: tiny, one call per batch or per matrix, row panels of X and of X X^T.
BATCHES = [(5, 12, 48), (5, 16, 300), (4, 17, 300), (3, 96, 128), (3, 255, 256), (3, 256, 256), (2, 256, 1024)]
LARGE = [(2, 767, 2048), (2, 768, 2048), (2, 2048, 2048)]


@pytest.mark.parametrize("ns", METHODS)
@pytest.mark.parametrize("shape", [(8, 8), (24, 40), (300, 260)])
def test_zero_stays_zero(ns: NewtonSchulz, shape: tuple[int, int]) -> None:
    assert not orthogonalize(torch.zeros(shape), ns).any()


@pytest.mark.parametrize("ns", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_change_no_bit(ns: NewtonSchulz, dtype: torch.dtype) -> None:
    for x in (random(24, 40).to(dtype), random(272, 260).to(dtype)):
        expected = orthogonalize(x, ns)
        for power in (-90, -37, -1, 1, 6, 90):
            assert torch.equal(orthogonalize(x * 2.0**power, ns), expected)


@pytest.mark.parametrize("ns", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(ns: NewtonSchulz, bad: float) -> None:
    batch = random(3, 24, 40)
    good = orthogonalize(batch, ns)
    batch[1, 5, 7] = bad
    found = orthogonalize(batch, ns)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("ns", METHODS)
def test_batch_is_the_loop(ns: NewtonSchulz) -> None:
    for shape in BATCHES:
        batch = random(*shape)
        assert torch.equal(orthogonalize(batch, ns), torch.stack([orthogonalize(x, ns) for x in batch])), shape


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("shape", LARGE)
def test_a_large_batch_is_the_loop(form: str, shape: tuple[int, int, int]) -> None:
    ns, batch = setting("opt4", form), random(*shape)
    assert torch.equal(orthogonalize(batch, ns), torch.stack([orthogonalize(x, ns) for x in batch]))


@pytest.mark.parametrize("ns", METHODS)
def test_same_input_same_bits(ns: NewtonSchulz) -> None:
    x = random(96, 128)
    assert torch.equal(orthogonalize(x, ns), orthogonalize(x.clone(), ns))
