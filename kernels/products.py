"""The matrix products of Newton-Schulz in plain torch, on any device.

Shapes: B matrices, M rows, N columns. P, R and W are symmetric, and polynomials of one matrix, so that they commute.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# Rows that are converted to float32 at a time, so that the copy stays in a CPU's cache.
ROWS_AT_ONCE = 256


class Products(Protocol):
    """What Newton-Schulz asks of a device; no method writes to its arguments."""

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M]."""
        ...

    def square(self, r_BMM: Tensor, alpha: float) -> Tensor:
        """Compute alpha R^2, [B, M, M]."""
        ...

    def square_norm(self, r_BMM: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Compute alpha R^2, [B, M, M], and the squared Frobenius norm of each, [B] float64."""
        ...

    def product(self, p_BMM: Tensor, w_BMM: Tensor) -> Tensor:
        """Compute P W, [B, M, M]."""
        ...

    def polynomial(self, r_BMM: Tensor, a: float, b: float, c: float) -> Tensor:
        """Compute aI + bR + cR^2, [B, M, M], with one rounding."""
        ...

    def combine(self, r_BMM: Tensor, square_BMM: Tensor, a_B: Tensor, b_B: Tensor, c_B: Tensor) -> Tensor:
        """Compute aI + bR + cS, [B, M, M], with one rounding, for coefficients of each matrix and a given S."""
        ...

    def multiply(self, w_BMM: Tensor, x_BMN: Tensor) -> Tensor:
        """Compute W X, [B, M, N]."""
        ...

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: float) -> Tensor:
        """Compute a X + P X, [B, M, N], with one rounding."""
        ...

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """Part of the multiplications of a symmetric product of a [rows, inner] matrix that is computed, 0.5 to 1."""
        ...


class TorchProducts:
    """Batched products of torch; the plain twin of the fast ones.

    No number of a product differs from call to call; those that do stay in elementwise operations, on the device.
    oneDNN would compile a product anew for every beta, and a GPU would have to be waited for.
    """

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M], all of it."""
        x = x_BMN.to(widened(x_BMN))
        return torch.bmm(x, x.mT).to(x_BMN.dtype)

    def square(self, r_BMM: Tensor, alpha: float) -> Tensor:
        """Compute alpha R^2, [B, M, M], all of it."""
        r = r_BMM.to(widened(r_BMM))
        return torch.baddbmm(r, r, r, beta=0.0, alpha=alpha).to(r_BMM.dtype)

    def square_norm(self, r_BMM: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Compute alpha R^2, [B, M, M], and the squared Frobenius norm of each, [B] float64."""
        square_BMM = self.square(r_BMM, alpha)
        return square_BMM, row_squares(square_BMM).double().sum(dim=-1)

    def product(self, p_BMM: Tensor, w_BMM: Tensor) -> Tensor:
        """Compute P W, [B, M, M], all of it."""
        return self.multiply(p_BMM, w_BMM)

    def polynomial(self, r_BMM: Tensor, a: float, b: float, c: float) -> Tensor:
        """Compute aI + bR + cR^2, [B, M, M]; with its diagonal in float32, since a may be much larger than the rest."""
        wide = r_BMM.to(widened(r_BMM))
        # torch's bfloat16 product ignores beta where alpha is 0.
        y_BMM = wide * b if c == 0 else torch.baddbmm(wide, wide, wide, beta=b, alpha=c)
        return with_diagonal(y_BMM, r_BMM, a, b, c).to(r_BMM.dtype)

    def combine(self, r_BMM: Tensor, square_BMM: Tensor, a_B: Tensor, b_B: Tensor, c_B: Tensor) -> Tensor:
        """Compute aI + bR + cS, [B, M, M], in float32."""
        y_BMM = (square_BMM * _each(c_B)).add_(r_BMM * _each(b_B))
        y_BMM.diagonal(dim1=-2, dim2=-1).add_(a_B.float()[:, None])
        return y_BMM.to(r_BMM.dtype)

    def multiply(self, w_BMM: Tensor, x_BMN: Tensor) -> Tensor:
        """Compute W X, [B, M, N]."""
        wide = widened(x_BMN)
        return torch.bmm(w_BMM.to(wide), x_BMN.to(wide)).to(x_BMN.dtype)

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: float) -> Tensor:
        """Compute a X + P X, [B, M, N]."""
        x = x_BMN.to(widened(x_BMN))
        return torch.baddbmm(x, p_BMM.to(x.dtype), x, beta=a).to(x_BMN.dtype)

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """All multiplications are computed."""
        return 1.0


def with_diagonal(y_BMM: Tensor, r_BMM: Tensor, a: float, b: float, c: float) -> Tensor:
    """Write the diagonal of aI + bR + cR^2, computed in float32, into bR + cR^2.

    Args:
        y_BMM: [B, M, M] bR + cR^2; written to.
        r_BMM: [B, M, M].
        a, b, c: coefficients.

    Returns:
        ``y_BMM``.
    """
    if a != 0:
        r_BM = r_BMM.diagonal(dim1=-2, dim2=-1).float()
        y_BMM.diagonal(dim1=-2, dim2=-1).copy_(a + b * r_BM + c * row_squares(r_BMM))
    return y_BMM


def row_squares(r_BMM: Tensor) -> Tensor:
    """Sum of squares of every row.

    Args:
        r_BMM: [B, M, M].

    Returns:
        [B, M] float32: rows are contiguous, so the order of a sum does not depend on the batch.
    """
    blocks = r_BMM.split(ROWS_AT_ONCE, dim=-2)  # type: ignore[no-untyped-call]
    norms = [torch.linalg.vector_norm(block, dim=-1, dtype=torch.float32) for block in blocks]
    return torch.cat(norms, dim=-1).square_()


def _each(scalar_B: Tensor) -> Tensor:
    return scalar_B.float()[:, None, None]


def widened(x_BMN: Tensor) -> torch.dtype:
    """Dtype to multiply in where a CPU would pick its 16-bit product by the size of the batch, hence its rounding.

    Args:
        x_BMN: [B, M, N] operand.

    Returns:
        float32 there, its own dtype elsewhere. Products are then rounded to 16 bits, as an accelerator's units do.
    """
    # oneDNN takes bfloat16 products of more than 16^3 multiplications, counted over the batch, and float16 on few CPUs.
    tiny = x_BMN.dtype == torch.bfloat16 and min(x_BMN.shape[-2:]) <= 16
    return torch.float32 if x_BMN.device.type == "cpu" and (tiny or x_BMN.dtype == torch.float16) else x_BMN.dtype
