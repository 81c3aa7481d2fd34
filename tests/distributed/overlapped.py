"""A model for tests of all-gathers that are left under way after a step."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distmuon


class Net(nn.Module):
    """A tied embedding, layers with a parameter of the model's own between them, and one layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(8))
        self.spare = nn.Linear(8, 8)
        source = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=source))

    def forward(self, tokens: Tensor) -> Tensor:
        """Loss of predicting the same tokens."""
        h = self.embed(tokens)
        for layer in self.layers:
            h = h + layer(h).tanh() * self.scale
        return F.cross_entropy(F.linear(h, self.embed.weight), tokens)


def make(
    group: Any = None, way: tuple[Any, Any] = ("balanced", "owner"), overlap: bool = True, bucket_mb: float = 0.0002
) -> tuple[Net, Any]:
    model = Net()
    opt = distmuon.DistMuon(
        distmuon.param_groups(model), 0.1, policy=way[0], transport=way[1], bucket_mb=bucket_mb, process_group=group
    )
    if overlap:
        opt.overlap_forward(model)
    return model, opt


def backward(model: Net, step: int, rank: int) -> float:
    """A forward and a backward; returns the loss."""
    loss = model(torch.randint(0, 20, (12,), generator=torch.Generator().manual_seed(10 * step + rank)))
    loss.backward()
    return float(loss.detach())


def advance(model: Net, opt: Any, step: int, rank: int) -> float:
    loss = backward(model, step, rank)
    opt.step()
    opt.zero_grad()
    return loss


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> dict[str, bool]:
    return {name: torch.equal(p, before[name]) for name, p in model.named_parameters()}
