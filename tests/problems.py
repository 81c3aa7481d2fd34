"""Small problems for tests of what every optimizer does, and the optimizers to solve them."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distmuon import DistMuon, Muon
from tests.distributed.scenario import leaves

BUILDS: list[Any] = [Muon, DistMuon]
Figure = Callable[[str], None]
both = pytest.mark.parametrize("build", BUILDS)


def network() -> nn.Sequential:
    """The same on every rank, also where ranks are threads that share torch's generator."""
    source = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=source))
    return model


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(x).square().mean()
    return loss


def advance(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def lines(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Parameter], dict[str, Tensor]]:
    """A matrix and a vector with the gradients of a linear loss."""
    source = torch.Generator().manual_seed(5)
    slopes = {"w": torch.randn(6, 4, generator=source), "b": torch.randn(5, generator=source)}
    return {name: Parameter(torch.zeros_like(slope, dtype=dtype)) for name, slope in slopes.items()}, slopes


def descend(params: dict[str, Parameter], slopes: dict[str, Tensor]) -> Tensor:
    return torch.stack([(params[name] * slope).sum() for name, slope in slopes.items()]).sum()


def keys(tree: Any) -> list[tuple[str, Any]]:
    """Paths in order, with the shape or the type of what is there."""
    return [(p, (x.dtype, x.shape) if isinstance(x, Tensor) else type(x)) for p, x in leaves(tree)]
