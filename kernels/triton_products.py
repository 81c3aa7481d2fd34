"""The matrix products of Newton-Schulz on the Triton kernels; the unsymmetric ones stay with torch's library.

Shapes: B matrices, M rows, N columns, K the side that a product sums over.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from distmuon.kernels import triton_ops
from distmuon.kernels.products import Scalar, TorchProducts, each

# Rows of the tiles that the shipped configurations prefer.
TILE = 128


class TritonProducts(TorchProducts):
    """Symmetric products on half the tiles, and aX + PX with its sum in float32."""

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M], from its lower triangle of tiles."""
        return triton_ops.symmetric_product(x_BMN, x_BMN, None, _on_device((1.0, 0.0, 0.0), x_BMN.device))

    def product(self, p_BMM: Tensor, q_BMM: Tensor, r_BMM: Tensor | None, alpha: Scalar, beta: Scalar) -> Tensor:
        """Compute alpha P Q + beta R, [B, M, M], from its lower triangle of tiles; q is symmetric bit for bit."""
        if isinstance(alpha, Tensor):
            scalars = torch.stack([alpha, each(beta, p_BMM).flatten(), torch.zeros_like(alpha)], dim=1)
        else:
            assert not isinstance(beta, Tensor), "alpha and beta are of one kind"
            scalars = _on_device((alpha, beta, 0.0), p_BMM.device)
        return triton_ops.symmetric_product(p_BMM, q_BMM, r_BMM, scalars)

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: Scalar) -> Tensor:
        """Compute a X + P X, [B, M, N]."""
        scalars = a[:, None] if isinstance(a, Tensor) else _on_device((a,), x_BMN.device)
        return triton_ops.add_product(x_BMN, p_BMM, scalars)

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """Tiles of the lower triangle, (t + 1) / 2t of t x t."""
        tiles = -(-rows // TILE)
        return (tiles + 1) / (2 * tiles)


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants that kernels read on the device, copied there once."""
    return torch.tensor(values, dtype=torch.float32, device=device)
