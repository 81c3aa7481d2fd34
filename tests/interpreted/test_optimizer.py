"""The optimizer on the Triton kernels against the same optimizer on torch's products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmuon import DistMuon, NewtonSchulz, orthogonalize
from distmuon.kernels import triton_ops

SHAPES = [(24, 40), (40, 24), (24, 40), (130, 72)]


def train(kernels: str, dtype: str = "bfloat16", preset: str = "opt5") -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    ns = NewtonSchulz.model_validate({"kernels": kernels, "dtype": dtype, "preset": preset})
    optimizer = DistMuon(params, lr=0.02, ns=ns)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    momenta = [reduction.bucket.first_moment for reduction in optimizer._reducer.reductions]
    return [param.detach() for param in params], momenta


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 2e-3), ("float16", 2e-3), ("float32", 1e-5)])
def test_training_agrees_with_torch(dtype: str, near: float) -> None:
    found, momenta = train("triton", dtype)
    expected, exact = train("torch", dtype)
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() < near * other.norm()
    for mine, other in zip(momenta, exact, strict=True):
        assert torch.equal(mine, other)


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    names = ("symmetric_product", "symmetric_product_norm", "add_product", "momentum_cast")
    for name in names:
        original = getattr(triton_ops, name)
        monkeypatch.setattr(triton_ops, name, lambda *a, _n=name, _f=original: called.append(_n) or _f(*a))
    train("triton")
    assert set(called) == set(names)


@pytest.mark.parametrize("preset", ["papers", "opt5"])
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_forms(preset: str, form: str) -> None:
    x = torch.randn(3, 70, 136, generator=torch.Generator().manual_seed(1))
    ns = {"preset": preset, "form": form}
    mine = orthogonalize(x, NewtonSchulz.model_validate({**ns, "kernels": "triton"})).float()
    other = orthogonalize(x, NewtonSchulz.model_validate({**ns, "kernels": "torch", "dtype": "float32"}))
    assert (mine - other).norm() < 0.02 * other.norm()


def test_the_measured_magnitudes_change_no_bit() -> None:
    x = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(2))
    ns = NewtonSchulz(kernels="triton")
    assert torch.equal(orthogonalize(x, ns, x.abs().amax(dim=(1, 2))), orthogonalize(x, ns))
