"""The matrix products of Newton-Schulz on the Triton kernels; the unsymmetric ones stay with torch's library.

Shapes: B matrices, M rows, N columns, K the side that a product sums over.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from distmuon.kernels import triton_ops
from distmuon.kernels.products import TorchProducts

# Rows of the tiles that the shipped configurations prefer.
TILE = 128


class TritonProducts(TorchProducts):
    """Symmetric products on half the tiles, and aX + PX with its sum in float32."""

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M], from its lower triangle of tiles."""
        return triton_ops.symmetric_product(x_BMN, x_BMN, None, _on_device((1.0, 0.0, 0.0), x_BMN.device))

    def square(self, r_BMM: Tensor, alpha: float) -> Tensor:
        """Compute alpha R^2, [B, M, M], from its lower triangle of tiles."""
        return triton_ops.symmetric_product(r_BMM, r_BMM, None, _on_device((alpha, 0.0, 0.0), r_BMM.device))

    def square_norm(self, r_BMM: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Compute alpha R^2, [B, M, M], and the squared norms of its unrounded values, [B] float64."""
        scalars = _on_device((alpha, 0.0, 0.0), r_BMM.device)
        square_BMM, squares_B = triton_ops.symmetric_product_norm(r_BMM, r_BMM, None, scalars)
        return square_BMM, squares_B.double()

    def product(self, p_BMM: Tensor, w_BMM: Tensor) -> Tensor:
        """Compute P W, [B, M, M], from its lower triangle of tiles; w is symmetric bit for bit."""
        return triton_ops.symmetric_product(p_BMM, w_BMM, None, _on_device((1.0, 0.0, 0.0), p_BMM.device))

    def polynomial(self, r_BMM: Tensor, a: float, b: float, c: float) -> Tensor:
        """Compute aI + bR + cR^2, [B, M, M], from its lower triangle of tiles."""
        return triton_ops.symmetric_product(r_BMM, r_BMM, r_BMM, _on_device((c, b, a), r_BMM.device))

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: float) -> Tensor:
        """Compute a X + P X, [B, M, N]."""
        return triton_ops.add_product(x_BMN, p_BMM, _on_device((a,), x_BMN.device))

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """Tiles of the lower triangle, (t + 1) / 2t of t x t."""
        tiles = -(-rows // TILE)
        return (tiles + 1) / (2 * tiles)


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants that kernels read on the device, copied there once."""
    return torch.tensor(values, dtype=torch.float32, device=device)
