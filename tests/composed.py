"""What Newton-Schulz approximates: odd polynomials of singular values, in float64; shares no code with the product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Quintics = Sequence[tuple[float, float, float]]


def start_norm(sigma: Tensor, start: str) -> Tensor:
    """Norm that matrices with singular values ``[..., K]`` are divided by, ``[..., 1]``."""
    if start == "frobenius":
        return sigma.square().sum(-1, keepdim=True).sqrt()
    assert start == "schatten8"
    return 1.005 * (sigma**8).sum(-1, keepdim=True) ** (1 / 8)


def compose(quintics: Quintics, sigma: Tensor) -> Tensor:
    """Apply (a, b, c) after (a, b, c) to every value."""
    for a, b, c in quintics:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def composed(x: Tensor, quintics: Quintics, start: str = "frobenius") -> Tensor:
    """The exact result for ``[..., M, N]`` matrices that are not zero."""
    left, sigma, right = torch.linalg.svd(x.to(torch.float64), full_matrices=False)
    sigma = compose(quintics, sigma / start_norm(sigma, start))
    return torch.matmul(left * sigma.unsqueeze(-2), right)
