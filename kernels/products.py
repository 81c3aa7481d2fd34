"""The matrix products of Newton-Schulz in plain torch, on any device.

Shapes: B matrices, M rows, N columns. P, Q, R and Z are symmetric, and polynomials of one matrix, so that they commute.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# A number for all matrices of a batch, or one for each, [B] float32, which is read on the device.
Scalar = float | Tensor
# Squares that are not scaled yet leave float16's range; this brings those of XX^T back for norms of X up to 32.
HALF_SQUARE = 2.0**-5


class Products(Protocol):
    """What Newton-Schulz asks of a device; no method writes to its arguments."""

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M]."""
        ...

    def product(self, p_BMM: Tensor, q_BMM: Tensor, r_BMM: Tensor | None, alpha: Scalar, beta: Scalar) -> Tensor:
        """Compute alpha P Q + beta R, [B, M, M]; no R counts as zero."""
        ...

    def multiply(self, q_BMM: Tensor, x_BMN: Tensor) -> Tensor:
        """Compute Q X, [B, M, N]."""
        ...

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: Scalar) -> Tensor:
        """Compute a X + P X, [B, M, N]."""
        ...

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """Part of the multiplications of a symmetric product of a [rows, inner] matrix that is computed, 0.5 to 1."""
        ...


class TorchProducts:
    """Batched products of torch; the plain twin of the fast ones.

    Products are P Q and never P Q^T: where rounding makes Q a little unsymmetric, its transpose would feed that back
    into Gram Newton-Schulz, which then diverges.
    """

    def gram(self, x_BMN: Tensor) -> Tensor:
        """Compute XX^T, [B, M, M], all of it."""
        x = x_BMN.to(widened(x_BMN))
        return torch.bmm(x, x.mT).to(x_BMN.dtype)

    def product(self, p_BMM: Tensor, q_BMM: Tensor, r_BMM: Tensor | None, alpha: Scalar, beta: Scalar) -> Tensor:
        """Compute alpha P Q + beta R, [B, M, M], all of it; one rounding, or two where numbers differ by matrix."""
        dtype, wide = p_BMM.dtype, widened(p_BMM)
        p, q = p_BMM.to(wide), q_BMM.to(wide)
        if isinstance(alpha, Tensor):
            # Squares could overflow float16 before alpha brings them back.
            stored = HALF_SQUARE if wide == torch.float16 else 1.0
            done = torch.baddbmm(p, p, q, beta=0.0, alpha=stored) * (alpha / stored)[:, None, None]
            return (done if r_BMM is None else done + each(beta, r_BMM) * r_BMM).to(dtype)
        if r_BMM is None:
            return torch.baddbmm(p, p, q, beta=0.0, alpha=alpha).to(dtype)
        assert not isinstance(beta, Tensor), "alpha and beta are of one kind"
        return torch.baddbmm(r_BMM.to(wide), p, q, beta=beta, alpha=alpha).to(dtype)

    def multiply(self, q_BMM: Tensor, x_BMN: Tensor) -> Tensor:
        """Compute Q X, [B, M, N]."""
        wide = widened(x_BMN)
        return torch.bmm(q_BMM.to(wide), x_BMN.to(wide)).to(x_BMN.dtype)

    def add_product(self, x_BMN: Tensor, p_BMM: Tensor, a: Scalar) -> Tensor:
        """Compute a X + P X, [B, M, N]; one rounding, or two where a differs by matrix."""
        x = x_BMN.to(widened(x_BMN))
        if isinstance(a, Tensor):
            return (torch.bmm(p_BMM.to(x.dtype), x) + each(a, x) * x).to(x_BMN.dtype)
        return torch.baddbmm(x, p_BMM.to(x.dtype), x, beta=a).to(x_BMN.dtype)

    def symmetric_fraction(self, rows: int, inner: int) -> float:
        """All multiplications are computed."""
        return 1.0


def each(scalar: Scalar, like: Tensor) -> Tensor:
    """Shape numbers for elementwise products with a batch.

    Args:
        scalar: one number, or one per matrix, [B].
        like: [B, ...] on the device.

    Returns:
        float32 [B, 1, 1].
    """
    if not isinstance(scalar, Tensor):
        scalar = torch.full((like.shape[0],), scalar, dtype=torch.float32, device=like.device)
    return scalar[:, None, None]


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
