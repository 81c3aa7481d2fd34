"""Elementwise update rules on flat tensors; they know neither ranks nor parameters.

Every line is one exactly rounded operation (no fused multiply-add, no lerp), so an element gets the same bits
wherever a shard boundary puts it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def momentum_(momentum: Tensor, grad: Tensor, mu: float, nesterov: bool) -> Tensor:
    """Advance heavy-ball momentum and return the Newton-Schulz input.

    Args:
        momentum: float32, updated in place: m <- mu m + g.
        grad: float32 of the same shape. Not written to.
        mu: momentum coefficient in [0, 1).
        nesterov: return g + mu m instead of m.

    Returns:
        A new float32 tensor.

    Source: Moonlight (arXiv 2502.16982), equation 1 with its Nesterov footnote.
    """
    momentum.mul_(mu).add_(grad)
    return momentum.mul(mu).add_(grad) if nesterov else momentum.clone()


def apply_(weight: Tensor, direction: Tensor, lr: float, scale: float, weight_decay: float) -> None:
    """Take a Muon step with decoupled weight decay: w <- w - lr (scale o + wd w).

    Args:
        weight: float32 master weights, updated in place.
        direction: orthogonalized update of the same shape, any dtype. Not written to.
        lr: learning rate.
        scale: RMS-matched scale of the whole matrix.
        weight_decay: decoupled weight decay.

    Source: Moonlight (arXiv 2502.16982), equation 3.
    """
    weight.mul_(1.0 - lr * weight_decay).sub_(direction.to(weight.dtype) * (lr * scale))


def adamw_(
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
    """Take an AdamW step.

    Args:
        weight: float32 master weights, updated in place.
        grad: float32 gradient. Not written to.
        first: float32 first moment, updated in place.
        second: float32 second moment, updated in place.
        step: number of this update, from 1.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2.
    """
    beta1, beta2 = betas
    weight.mul_(1.0 - lr * weight_decay)
    first.mul_(beta1).add_(grad * (1.0 - beta1))
    # A finite gradient whose square is not would stop its element for good.
    square = grad.square().clamp_(max=torch.finfo(grad.dtype).max)
    second.mul_(beta2).add_(square.mul_(1.0 - beta2))
    denominator = second.sqrt().div_((1.0 - beta2**step) ** 0.5).add_(eps)
    weight.sub_((first / denominator).mul_(lr / (1.0 - beta1**step)))
