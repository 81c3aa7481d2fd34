"""The AdamW rule and its optional NVIDIA apex backend."""

from __future__ import annotations

import importlib
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from distmuon.errors import ConfigError
from distmuon.update import adamw_


class AdamWRule(Protocol):
    """An in-place AdamW step on flat float32 tensors, as ``distmuon.update.adamw_`` defines it."""

    def __call__(
        self,
        weight: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Update weight, first and second in place."""


class ApexAdamW:
    """``apex.optimizers.FusedAdam`` driven over shard tensors whose state this package owns.

    Args:
        fused_adam: the class ``apex.optimizers.FusedAdam``.
    """

    def __init__(self, fused_adam: Any) -> None:
        self._weight = torch.nn.Parameter(torch.zeros(1))
        self._optimizer = fused_adam([self._weight], bias_correction=True, adam_w_mode=True)

    def __call__(
        self,
        weight: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Update weight, first and second in place with one fused kernel."""
        self._weight.data = weight
        self._weight.grad = grad
        # FusedAdam counts steps per group and adds one before it computes the bias corrections.
        self._optimizer.param_groups[0].update(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step - 1)
        self._optimizer.state[self._weight] = {"exp_avg": first, "exp_avg_sq": second}
        self._optimizer.step()
        self._weight.grad = None


def choose_adamw(backend: Literal["auto", "torch", "apex"], device: torch.device) -> AdamWRule:
    """Pick the AdamW implementation.

    Args:
        backend: "torch", "apex", or "auto": apex on CUDA where NVIDIA's is installed, torch elsewhere.
        device: where the parameters live.

    Returns:
        The rule.

    Raises:
        ConfigError: "apex" was asked for and NVIDIA's apex is not importable.
    """
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return adamw_
    try:
        # The package called apex on PyPI is an unrelated web toolkit, without this module.
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        if backend == "auto":
            return adamw_
        raise ConfigError(
            'adamw_backend = "apex" needs NVIDIA apex, which is not importable here; build it from '
            'github.com/NVIDIA/apex, use the Dockerfile, or set adamw_backend = "torch".'
        ) from None
    return ApexAdamW(fused_adam)
