"""The matrix products of Newton-Schulz where a CPU computes them fastest.

Every choice goes by the shape of one matrix, never by the batch, so that a batch has the bits of its matrices alone.
Shapes: B matrices, M rows, N columns, K the side that a product sums over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.kernels.products import ROWS_AT_ONCE, TorchProducts, widened, with_diagonal

# Measured with `distmuon bench ns --thresholds` on a CPU with bfloat16 units: rows of a panel, from where panels beat
# one product, and from where a call per matrix costs less than float32 temporaries.
PANEL = 256
PANEL_ROWS = 768
PANEL_INNER = 2048
ALONE_ROWS = 256


class CpuProducts(TorchProducts):
    """Large symmetric products by row panels, and large matrices combined one by one, in one float32 temporary."""

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M]."""
        if not _in_panels(x_BMN):
            return super().gram(x_BMN)
        return _stack([_by_panels(x_MN, x_MN.mT) for x_MN in x_BMN])

    def square(self, r_BMM: Tensor, alpha: float) -> Tensor:
        """Compute alpha R^2, [B, M, M]."""
        return self.product(r_BMM, r_BMM) if alpha == 1.0 else super().square(r_BMM, alpha)

    def product(self, p_BMM: Tensor, w_BMM: Tensor) -> Tensor:
        """Compute P W, [B, M, M]."""
        if not _in_panels(p_BMM):
            return super().product(p_BMM, w_BMM)
        return _stack([_by_panels(p, w) for p, w in zip(p_BMM, w_BMM, strict=True)])

    def polynomial(self, r_BMM: Tensor, a: float, b: float, c: float) -> Tensor:
        """Compute aI + bR + cR^2, [B, M, M]."""
        if c == 0 or not _in_panels(r_BMM):
            return super().polynomial(r_BMM, a, b, c)
        return with_diagonal(_stack([_by_panels(r, r, r, c, b) for r in r_BMM]), r_BMM, a, b, c)

    def combine(self, r_BMM: Tensor, square_BMM: Tensor, a_B: Tensor, b_B: Tensor, c_B: Tensor) -> Tensor:
        """Compute aI + bR + cS, [B, M, M]."""
        if r_BMM.shape[-2] < ALONE_ROWS:
            return super().combine(r_BMM, square_BMM, a_B, b_B, c_B)
        results = []
        numbers = zip(r_BMM, square_BMM, *(n_B.float().tolist() for n_B in (a_B, b_B, c_B)), strict=True)
        for r_MM, square_MM, a, b, c in numbers:
            y_MM = torch.empty_like(r_MM)
            for start in range(0, y_MM.shape[0], ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                part = square_MM[rows].to(torch.float32, copy=True).mul_(c).add_(r_MM[rows], alpha=b)
                part.diagonal(start).add_(a)
                y_MM[rows] = part
            results.append(y_MM)
        return _stack(results)

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """Panels compute (t + 1) / 2t of a product of t panels."""
        if rows < PANEL_ROWS or inner < PANEL_INNER:
            return 1.0
        panels = -(-rows // PANEL)
        return (panels + 1) / (2 * panels)


def _in_panels(x_BMK: Tensor) -> bool:
    return x_BMK.shape[-2] >= PANEL_ROWS and x_BMK.shape[-1] >= PANEL_INNER and widened(x_BMK) == x_BMK.dtype


def _stack(results: list[Tensor]) -> Tensor:
    return torch.stack(results) if len(results) > 1 else results[0][None]


def _by_panels(a_MK: Tensor, b_KM: Tensor, c_MM: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Compute alpha A B + beta C, [M, M] symmetric: the lower trapezoid by panels of rows, then its mirror image."""
    rows = a_MK.shape[0]
    y_MM = a_MK.new_empty(rows, rows)
    for start in range(0, rows, PANEL):
        end = min(start + PANEL, rows)
        panel, a, b = y_MM[start:end, :end], a_MK[start:end], b_KM[:, :end]
        if c_MM is None:
            torch.mm(a, b, out=panel)
        else:
            torch.addmm(c_MM[start:end, :end], a, b, beta=beta, alpha=alpha, out=panel)
        y_MM[:start, start:end] = panel[:, :start].mT
    return y_MM
