"""Muon as K. Jordan's repository distributes it, in plain code: a baseline.

Gradients are all-reduced by DistributedDataParallel; rank i mod d orthogonalizes matrix i; every d matrices one
all-gather of parameters. Where d matrices differ in shape the original fails on gloo; here those are padded to the
largest, which costs bytes that NCCL, which gathers unequal tensors, would not send.

Source: K. Jordan et al., "Muon", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def newton_schulz(g_MN: Tensor) -> Tensor:
    """Orthogonalize one matrix in bfloat16.

    Args:
        g_MN: [M, N]. Not written to.

    Returns:
        [M, N] bfloat16.
    """
    a, b, c = _QUINTIC
    x = g_MN.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    direction: Tensor = x.mT if tall else x
    return direction


class OwnerGather(torch.optim.Optimizer):
    """Muon for matrices whose gradients are equal on all ranks.

    Args:
        params: [M, N] matrices.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: in [0, 1).
        alone: whether this rank owns all matrices, whatever the others do.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float, *, alone: bool = False
    ) -> None:
        by_size = sorted(params, key=lambda parameter: parameter.shape, reverse=True)
        self.world, self.rank = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
        super().__init__(by_size, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all matrices; every rank must call it.

        Args:
            closure: not supported.
        """
        world, rank = self.world, self.rank
        for group in self.param_groups:
            params = group["params"]
            for start in range(0, len(params), world):
                block = params[start : start + world]
                if rank < len(block):
                    self._update(block[rank], group)
                if world > 1:
                    gather(block, world, rank)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        direction = newton_schulz(grad.lerp(momentum, group["momentum"]))
        scale = math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * scale)


def gather(block: list[Tensor], world: int, rank: int) -> None:
    """Send every matrix of a block from its owner to all ranks.

    Args:
        block: at most d matrices; rank i owns the i-th.
        world: number of ranks d.
        rank: this rank.
    """
    numel = max(parameter.numel() for parameter in block)
    if all(parameter.shape == block[0].shape for parameter in block):
        missing = [torch.empty_like(block[0]) for _ in range(world - len(block))]
        dist.all_gather([*block, *missing], block[rank] if rank < len(block) else missing[0])
        return
    sent = block[0].new_zeros(numel)
    if rank < len(block):
        sent[: block[rank].numel()] = block[rank].reshape(-1)
    received = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(received, sent)
    for parameter, values in zip(block, received, strict=False):
        parameter.copy_(values[: parameter.numel()].view_as(parameter))
