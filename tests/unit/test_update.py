"""The elementwise rules by hand, against torch, and independent of where a shard is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon.update import adamw_, apply_, momentum_

ADAMW: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Sizes around the widths of vector registers, cut at odd places.
CUTS = [(1003, (1, 8, 17, 333, 640, 1002)), (67, (3, 31, 32, 33, 64)), (5, (1, 2, 3, 4))]


def values(count: int, numel: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


def test_momentum_by_hand() -> None:
    momentum, grad = torch.tensor([2.0, -4.0]), torch.tensor([1.0, 0.5])
    found = momentum_(momentum, grad, 0.5, nesterov=False)
    assert momentum.tolist() == [2.0, -1.5]
    assert found.tolist() == [2.0, -1.5]
    assert grad.tolist() == [1.0, 0.5]
    found.zero_()
    assert momentum.tolist() == [2.0, -1.5]


def test_nesterov_by_hand() -> None:
    momentum, grad = torch.tensor([2.0, -4.0]), torch.tensor([1.0, 0.5])
    found = momentum_(momentum, grad, 0.5, nesterov=True)
    assert momentum.tolist() == [2.0, -1.5]
    assert found.tolist() == [2.0, -0.25]
    found.zero_()
    assert momentum.tolist() == [2.0, -1.5]
    assert grad.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_by_hand(dtype: torch.dtype) -> None:
    """w - lr (scale o + wd w) = 4 - 0.5 (3 * 0.25 + 0.25 * 4)."""
    weight, direction = torch.tensor([4.0, -4.0]), torch.tensor([0.25, -0.5], dtype=dtype)
    apply_(weight, direction, lr=0.5, scale=3.0, weight_decay=0.25)
    assert weight.tolist() == [3.125, -2.75]
    assert direction.tolist() == [0.25, -0.5]


def test_decay_does_not_touch_the_direction_and_lr_zero_touches_nothing() -> None:
    weight, direction = values(2, 9)
    before = weight.clone()
    apply_(weight, direction, lr=0.0, scale=3.0, weight_decay=0.25)
    assert torch.equal(weight, before)
    apply_(weight, torch.zeros(9), lr=0.5, scale=3.0, weight_decay=0.25)
    assert torch.equal(weight, before * 0.875)


def test_first_adamw_step_by_hand() -> None:
    """Bias correction makes the first step lr * g / (|g| + eps), whatever the decay rates."""
    weight, grad = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4.0, -2.0, 0.0])
    first, second = torch.zeros(3), torch.zeros(3)
    adamw_(weight, grad, first, second, step=1, lr=0.1, betas=(0.5, 0.75), eps=2.0, weight_decay=0.5)
    expected = torch.tensor([0.95 - 0.1 * 4 / 6, 0.95 + 0.1 * 2 / 4, 0.95])
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)
    assert first.tolist() == [2.0, -1.0, 0.0]
    assert second.tolist() == [4.0, 1.0, 0.0]
    assert grad.tolist() == [4.0, -2.0, 0.0]


@pytest.mark.parametrize(
    "changed",
    [{}, {"weight_decay": 0.0}, {"betas": (0.0, 0.5)}, {"betas": (0.5, 0.0)}, {"eps": 0.1}, {"lr": 1.0}],
)
def test_adamw_is_torchs(changed: dict[str, Any]) -> None:
    setting = ADAMW | changed
    start, *grads = (tensor.double() for tensor in values(9, 50))
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], **setting, foreach=False)
    weight, first, second = start.clone(), torch.zeros(50).double(), torch.zeros(50).double()
    for step, grad in enumerate(grads, start=1):
        parameter.grad = grad.clone()
        theirs.step()
        adamw_(weight, grad, first, second, step=step, **setting)
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("numel", "cuts"), CUTS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mu", [0.95, 0.3])
def test_momentum_has_the_same_bits_in_any_shard(numel: int, cuts: tuple[int, ...], nesterov: bool, mu: float) -> None:
    whole, *grads = values(4, numel)
    parts = whole.clone()
    for grad in grads:
        expected = momentum_(whole, grad, mu, nesterov)
        found = [momentum_(parts[a:b], grad[a:b], mu, nesterov) for a, b in edges(numel, cuts)]
        assert torch.equal(torch.cat(found), expected)
        assert torch.equal(parts, whole)


@pytest.mark.parametrize(("numel", "cuts"), CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_has_the_same_bits_in_any_shard(numel: int, cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    whole, *directions = values(4, numel)
    parts = whole.clone()
    for direction in directions:
        direction = direction.to(dtype)
        apply_(whole, direction, 0.0173, 1.3, 0.1)
        for a, b in edges(numel, cuts):
            apply_(parts[a:b], direction[a:b], 0.0173, 1.3, 0.1)
        assert torch.equal(parts, whole)


@pytest.mark.parametrize(("numel", "cuts"), CUTS)
def test_adamw_has_the_same_bits_in_any_shard(numel: int, cuts: tuple[int, ...]) -> None:
    """Slices at odd offsets, and slices copied to the start of memory of their own."""
    start, *grads = values(5, numel)
    whole = [start.clone(), torch.zeros(numel), torch.zeros(numel)]
    parts = [tensor.clone() for tensor in whole]
    moved = [[tensor[a:b].clone() for tensor in whole] for a, b in edges(numel, cuts)]
    for step, grad in enumerate(grads, start=1):
        adamw_(whole[0], grad, whole[1], whole[2], step=step, **ADAMW)
        for (a, b), own in zip(edges(numel, cuts), moved, strict=True):
            weight, first, second = (tensor[a:b] for tensor in parts)
            adamw_(weight, grad[a:b], first, second, step=step, **ADAMW)
            adamw_(own[0], grad[a:b].clone(), own[1], own[2], step=step, **ADAMW)
        for index, tensor in enumerate(whole):
            assert torch.equal(parts[index], tensor)
            assert torch.equal(torch.cat([own[index] for own in moved]), tensor)


def edges(numel: int, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((0, *cuts), (*cuts, numel), strict=True))
