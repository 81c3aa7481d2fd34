"""Every learning-rate scheduler of torch, with the rates and momenta that it gives, computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR

STEPS = 6


class Scheduled(NamedTuple):
    """How to build a scheduler, and the rate and momentum of step t where the group started with rate b."""

    build: Callable[[Any], Any]
    rate: Callable[[int, float], float]
    momentum: Callable[[int], float] = lambda t: 0.95
    metric: bool = False


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _swa(t: int, b: float) -> float:
    """From b to 0.02 along a cosine in 4 steps; the first is the present rate."""
    return 0.02 + (b - 0.02) * _cosine(min(t, 4) / 4)


s = torch_schedulers
SCHEDULERS: dict[str, Scheduled] = {
    "LambdaLR": Scheduled(lambda o: s.LambdaLR(o, lambda t: 1 / (1 + t)), lambda t, b: b / (1 + t)),
    "MultiplicativeLR": Scheduled(
        lambda o: s.MultiplicativeLR(o, lambda t: 0.9 - 0.1 * t),
        lambda t, b: b * math.prod(0.9 - 0.1 * k for k in range(1, t + 1)),
    ),
    "StepLR": Scheduled(lambda o: s.StepLR(o, 2, gamma=0.5), lambda t, b: b * 0.5 ** (t // 2)),
    "MultiStepLR": Scheduled(
        lambda o: s.MultiStepLR(o, [1, 4], gamma=0.1), lambda t, b: b * 0.1 ** ((t >= 1) + (t >= 4))
    ),
    "ConstantLR": Scheduled(lambda o: s.ConstantLR(o, 0.5, total_iters=3), lambda t, b: b * (0.5 if t < 3 else 1)),
    "LinearLR": Scheduled(
        lambda o: s.LinearLR(o, start_factor=0.25, total_iters=4), lambda t, b: b * (0.25 + 0.75 * min(t, 4) / 4)
    ),
    "ExponentialLR": Scheduled(lambda o: s.ExponentialLR(o, 0.8), lambda t, b: b * 0.8**t),
    "SequentialLR": Scheduled(
        lambda o: s.SequentialLR(o, [s.ConstantLR(o, 0.5, total_iters=10), s.ExponentialLR(o, 0.9)], milestones=[3]),
        lambda t, b: b * (0.5 if t < 3 else 0.9 ** (t - 3)),
    ),
    "CosineAnnealingLR": Scheduled(
        lambda o: s.CosineAnnealingLR(o, 8, eta_min=0.01), lambda t, b: 0.01 + (b - 0.01) * _cosine(t / 8)
    ),
    "ChainedScheduler": Scheduled(
        lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.5, total_iters=2), s.ExponentialLR(o, 0.9)]),
        lambda t, b: b * (0.5 if t < 2 else 1) * 0.9**t,
    ),
    "ReduceLROnPlateau": Scheduled(
        lambda o: s.ReduceLROnPlateau(o, factor=0.5, patience=0), lambda t, b: b * 0.5 ** max(0, t - 1), metric=True
    ),
    "CyclicLR": Scheduled(
        lambda o: s.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
        lambda t, b: 0.01 + 0.09 * (0, 0.5, 1, 0.5)[t % 4],
        lambda t: 0.9 - 0.1 * (0, 0.5, 1, 0.5)[t % 4],
    ),
    "CosineAnnealingWarmRestarts": Scheduled(
        lambda o: s.CosineAnnealingWarmRestarts(o, 2, T_mult=2),
        lambda t, b: b * _cosine(t / 2 if t < 2 else (t - 2) / 4),
    ),
    "OneCycleLR": Scheduled(
        lambda o: s.OneCycleLR(o, 0.1, total_steps=8, pct_start=0.5, anneal_strategy="linear"),
        lambda t, b: 0.004 + 0.096 * t / 3 if t <= 3 else 0.1 + (0.004e-4 - 0.1) * (t - 3) / 4,
        lambda t: 0.95 - 0.1 * t / 3 if t <= 3 else 0.85 + 0.1 * (t - 3) / 4,
    ),
    "PolynomialLR": Scheduled(lambda o: s.PolynomialLR(o, total_iters=8, power=2.0), lambda t, b: b * (1 - t / 8) ** 2),
    "SWALR": Scheduled(lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=4), _swa),
}
BY_TORCH = {name for name in torch_schedulers.__all__ if name not in ("LRScheduler", "_LRScheduler")}
