"""One Newton-Schulz call per shape and step, whatever the bucket."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmuon import DistMuon, NewtonSchulz, batches, orthogonalize
from distmuon.errors import ParameterError

SHAPES = [(24, 40), (40, 24), (24, 40), (16, 24), (24, 40), (16, 24)]


def gradients(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("bucket_mb", [1e-6, 0.005, 25.0])
def test_one_call_per_shape_and_step(bucket_mb: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, *rest: object) -> Tensor:
        calls.append(tuple(x.shape))
        return orthogonalize(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batches, "orthogonalize", counted)
    params = [torch.nn.Parameter(grad.clone()) for grad in gradients()]
    optimizer = DistMuon(params, lr=0.1, bucket_mb=bucket_mb)
    for step in (1, 2):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        calls.clear()
        optimizer.step()
        assert sorted(calls) == [(1, 40, 24), (2, 16, 24), (3, 24, 40)]
    assert (len(optimizer.plans[0].buckets) > 1) == (bucket_mb < 1)


@pytest.mark.parametrize(
    ("largest", "x"),
    [
        (torch.ones(3), torch.ones(2, 4, 4)),
        (torch.ones(2, dtype=torch.float64), torch.ones(2, 4, 4)),
        (torch.ones(2), torch.ones(2, 4, 4, dtype=torch.float64)),
    ],
)
def test_magnitudes_that_do_not_go_with_the_matrices(largest: Tensor, x: Tensor) -> None:
    with pytest.raises(ParameterError, match=r"it must be float32 of shape \(2,\)"):
        orthogonalize(x, NewtonSchulz(), largest)


def test_matrices_of_one_shape_on_two_devices_are_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []

    def counted(x: Tensor, *_: object) -> Tensor:
        calls.append(x.device)
        return x

    monkeypatch.setattr(batches, "orthogonalize", counted)
    plan = DistMuon([torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(4, 6))]).plans[0]
    first, second = (matrix for bucket in plan.buckets for matrix in bucket.matrices)
    inputs = [{first: torch.ones(4, 6), second: torch.ones(4, 6, device="meta")}]
    (found,) = batches.orthogonalize_by_shape(inputs, [{}], NewtonSchulz())
    assert set(found) == {first, second}
    assert [device.type for device in calls] == ["cpu", "meta"]
