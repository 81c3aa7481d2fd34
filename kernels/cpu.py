"""The matrix products of Newton-Schulz where a CPU computes them fastest.

Every choice goes by the shape of one matrix, never by the batch, so that a batch has the bits of its matrices alone.
Shapes: B matrices, M rows, N columns, K the side that a product sums over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmuon.kernels.products import Scalar, TorchProducts, widened

# Measured with `distmuon bench ns --thresholds` on a CPU with bfloat16 units: rows of a panel, from where panels beat
# one product, and from where one call per matrix costs less than an elementwise pass.
PANEL = 256
PANEL_ROWS = 768
PANEL_INNER = 2048
LOOP_ROWS = 256


class CpuProducts(TorchProducts):
    """Large symmetric products by row panels, and numbers that differ by matrix fused into one call per matrix."""

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M]."""
        if not _in_panels(x_BMN):
            return super().gram(x_BMN)
        return torch.stack([_by_panels(x_MN, x_MN.mT, None, 1.0, 0.0) for x_MN in x_BMN])

    def product(self, p_BMM: Tensor, q_BMM: Tensor, r_BMM: Tensor | None, alpha: Scalar, beta: Scalar) -> Tensor:
        """Compute alpha P Q + beta R, [B, M, M], with one rounding for matrices of ``LOOP_ROWS`` and more."""
        panels = _in_panels(p_BMM)
        if not panels and not (isinstance(alpha, Tensor) and _in_loop(p_BMM)):
            return super().product(p_BMM, q_BMM, r_BMM, alpha, beta)
        results = []
        for index, (a, b) in enumerate(zip(_numbers(alpha, p_BMM), _numbers(beta, p_BMM), strict=True)):
            p, q, r = p_BMM[index], q_BMM[index], None if r_BMM is None else r_BMM[index]
            compute = _by_panels if panels else _whole
            # oneDNN hands numbers that are not finite to a scalar loop, a thousand times slower.
            finite = math.isfinite(a) and math.isfinite(b)
            results.append(compute(p, q, r, a, b) if finite else torch.full_like(p, torch.nan))
        return torch.stack(results) if len(results) > 1 else results[0][None]

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: Scalar) -> Tensor:
        """Compute a X + P X, [B, M, N], with one rounding for matrices of ``LOOP_ROWS`` rows and more."""
        if not (isinstance(a, Tensor) and _in_loop(x_BMN)):
            return super().add_product(x_BMN, p_BMM, a)
        results = [
            torch.addmm(x, p, x, beta=number) if math.isfinite(number) else torch.full_like(x, torch.nan)
            for x, p, number in zip(x_BMN, p_BMM, a.tolist(), strict=True)
        ]
        return torch.stack(results) if len(results) > 1 else results[0][None]

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """Panels compute (t + 1) / 2t of a product of t panels."""
        if rows < PANEL_ROWS or inner < PANEL_INNER:
            return 1.0
        panels = -(-rows // PANEL)
        return (panels + 1) / (2 * panels)


def _in_panels(x_BMK: Tensor) -> bool:
    return x_BMK.shape[-2] >= PANEL_ROWS and x_BMK.shape[-1] >= PANEL_INNER and widened(x_BMK) == x_BMK.dtype


def _in_loop(x_BMK: Tensor) -> bool:
    return x_BMK.shape[-2] >= LOOP_ROWS and widened(x_BMK) == x_BMK.dtype


def _numbers(scalar: Scalar, like: Tensor) -> list[float]:
    return scalar.tolist() if isinstance(scalar, Tensor) else [scalar] * like.shape[0]


def _whole(p_MM: Tensor, q_MM: Tensor, r_MM: Tensor | None, alpha: float, beta: float) -> Tensor:
    if r_MM is None:
        return torch.addmm(p_MM, p_MM, q_MM, beta=0.0, alpha=alpha)
    return torch.addmm(r_MM, p_MM, q_MM, beta=beta, alpha=alpha)


def _by_panels(a_MK: Tensor, b_KM: Tensor, c_MM: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Compute alpha A B + beta C, [M, M] symmetric: the lower trapezoid by panels of rows, then its mirror image."""
    rows = a_MK.shape[0]
    y_MM = a_MK.new_empty(rows, rows)
    for start in range(0, rows, PANEL):
        end = min(start + PANEL, rows)
        panel = y_MM[start:end, :end]
        if c_MM is None and alpha == 1.0:
            torch.mm(a_MK[start:end], b_KM[:, :end], out=panel)
        else:
            c = panel if c_MM is None else c_MM[start:end, :end]
            torch.addmm(c, a_MK[start:end], b_KM[:, :end], beta=0.0 if c_MM is None else beta, alpha=alpha, out=panel)
        y_MM[:start, start:end] = panel[:, :start].mT
    return y_MM
