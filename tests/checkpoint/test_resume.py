"""Forty steps, and twenty, a new process, and twenty more: the same bits, with dropout, a schedule and data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import distmuon
from distmuon import checkpoint
from tests.checkpoint.forked import run_forked, values
from tests.checkpoint.scene import Figure, whole

HALF, VOCAB, ROWS = 20, 30, 4


class Net(nn.Module):
    """An embedding, a hidden layer, a norm, dropout, and a buffer that counts."""

    seen: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, VOCAB, bias=False)
        self.register_buffer("seen", torch.zeros(VOCAB, dtype=torch.int64))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        self.seen += 1
        return self.head(F.dropout(F.silu(self.norm(self.hidden(self.embed(x)))), 0.3, self.training))  # type: ignore[no-any-return]


class Data:
    """Tokens in an order that is shuffled anew in every epoch; its position is all that there is to keep."""

    def __init__(self) -> None:
        self.position = 0

    def batch(self, rank: int, world: int) -> Tensor:
        per_epoch = 12
        epoch, index = divmod(self.position, per_epoch)
        order = torch.randperm(per_epoch * 4 * ROWS, generator=torch.Generator().manual_seed(epoch))
        self.position += 1
        start = (index * 4 + rank) * ROWS
        return order[start : start + ROWS] % VOCAB


def setup(rank: int, dtype: str, muon: bool) -> tuple[Net, Any, OneCycleLR, Data]:
    model = Net(getattr(torch, dtype))
    kind = distmuon.Muon if muon else distmuon.DistMuon
    opt: Any = kind(model.named_parameters(), lr=0.02, adamw_lr=0.01, max_grad_norm=1.0)
    scheduler = OneCycleLR(opt, [0.02, 0.01], total_steps=2 * HALF + 5, cycle_momentum=not muon)
    torch.manual_seed(100 + rank)
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    # Both draw Gaussians in pairs: at the save one of a pair is still to come.
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    return model, opt, scheduler, Data()


def train(rank: int, world: int, parts: tuple[Net, Any, OneCycleLR, Data], steps: int) -> list[float]:
    """Losses; every generator is drawn from."""
    model, opt, scheduler, data = parts
    losses = []
    for _ in range(steps):
        x = data.batch(rank, world)
        noise = random.random() + np.random.standard_normal()  # noqa: NPY002
        loss = F.cross_entropy(model(x).float(), (x * 7 + 3) % VOCAB) * (1 + 0.01 * noise)
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        opt.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def state(parts: tuple[Net, Any, OneCycleLR, Data]) -> dict[str, Any]:
    """Everything that the next step depends on, as plain values."""
    model, opt, scheduler, data = parts
    tensors = {name: tensor.reshape(-1).double().tolist() for name, tensor in whole(model, opt).items()}
    groups = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in opt.param_groups]
    drawn = [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist()]  # noqa: NPY002
    return {
        "tensors": tensors,
        "groups": groups,
        "scheduler": scheduler.state_dict(),
        "position": data.position,
        "drawn": drawn,
    }


def straight(rank: int, world: int, dtype: str, muon: bool, folder: Path) -> tuple[list[float], dict[str, Any]]:
    """All steps; what is saved on the way changes nothing, as ``undisturbed`` shows."""
    parts = setup(rank, dtype, muon)
    losses = train(rank, world, parts, HALF)
    model, opt, scheduler, data = parts
    checkpoint.save(
        folder, model, opt, step=HALF, extra={"position": data.position, "scheduler": scheduler.state_dict()}
    )
    return losses + train(rank, world, parts, HALF), state(parts)


def undisturbed(rank: int, world: int, dtype: str, muon: bool) -> tuple[list[float], dict[str, Any]]:
    parts = setup(rank, dtype, muon)
    return train(rank, world, parts, 2 * HALF), state(parts)


def second_half(rank: int, world: int, dtype: str, muon: bool, folder: Path) -> tuple[list[float], dict[str, Any]]:
    parts = setup(rank, dtype, muon)
    model, opt, scheduler, data = parts
    train(rank, world, parts, 2)
    restored = checkpoint.load(folder, model, opt)
    scheduler.load_state_dict(restored.extra["scheduler"])
    data.position = restored.extra["position"]
    assert restored.step == HALF
    return train(rank, world, parts, HALF), state(parts)


@pytest.mark.fault("F8")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("world", "muon"), [(1, True), (1, False), (2, False), (4, False)])
def test_resuming_is_as_if_nothing_had_happened(
    tmp_path: Path, world: int, muon: bool, dtype: str, figure: Figure
) -> None:
    want = values(run_forked(straight, dtype, muon, tmp_path, world=world))
    found = values(run_forked(second_half, dtype, muon, tmp_path, world=world))
    for (losses, end), (after, resumed) in zip(want, found, strict=True):
        assert after == losses[HALF:]
        for key, value in end.items():
            assert resumed[key] == value, key
        assert len(set(losses)) == 2 * HALF
    name = "Muon" if muon else "DistMuon"
    figure(
        f"{name}, {world} ranks, {dtype}: {len(want[0][1]['tensors'])} tensors, generators, lr and data position equal"
    )


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """And ranks draw differently: one generator for all would make all dropout masks the same."""
    saving = values(run_forked(straight, "float32", False, tmp_path, world=2))
    assert saving == values(run_forked(undisturbed, "float32", False, world=2))
    (first, one), (second, two) = saving
    assert first != second
    assert one["tensors"] == two["tensors"]
    assert all(a != b for a, b in zip(one["drawn"], two["drawn"], strict=True))
