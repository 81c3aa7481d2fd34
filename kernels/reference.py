"""Plain torch twins of the kernels: the specification, the fallback and the test oracle.

Shapes: B matrices, M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Quintic = tuple[float, float, float]


def quintic_step(x_BMN: Tensor, coefficients: Quintic) -> Tensor:
    """One Newton-Schulz iteration, X <- aX + (bA + cA^2)X with A = XX^T.

    Args:
        x_BMN: [B, M, N] matrices in the working dtype; cheapest for M <= N. Not written to.
        coefficients: (a, b, c).

    Returns:
        [B, M, N] in the same dtype. A matrix gets the same bits in a batch of any size.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = coefficients
    dtype = x_BMN.dtype
    if _needs_float32(x_BMN):
        x_BMN = x_BMN.float()
    gram_BMM = torch.bmm(x_BMN, x_BMN.mT).to(dtype).to(x_BMN.dtype)
    polynomial_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c).to(dtype).to(x_BMN.dtype)
    return torch.baddbmm(x_BMN, polynomial_BMM, x_BMN, beta=a).to(dtype)


def _needs_float32(x_BMN: Tensor) -> bool:
    """Whether a CPU would pick its 16-bit product by the size of the batch, so that its rounding depends on it.

    Then products are computed in float32 and rounded to 16 bits, which is what an accelerator's matrix units do.
    """
    rows, columns = x_BMN.shape[-2:]
    # oneDNN takes bfloat16 products of more than 16^3 multiplications, counted over the batch, and float16 on few CPUs.
    tiny = x_BMN.dtype == torch.bfloat16 and min(rows, columns) <= 16
    return x_BMN.device.type == "cpu" and (tiny or x_BMN.dtype == torch.float16)


def newton_schulz(x_BMN: Tensor, coefficients: Sequence[Quintic]) -> Tensor:
    """Run one quintic step per coefficient triple.

    Args:
        x_BMN: [B, M, N] matrices with spectral norm at most about 1. Not written to.
        coefficients: one (a, b, c) per iteration.

    Returns:
        [B, M, N] approximately orthogonal matrices in the same dtype.
    """
    for triple in coefficients:
        x_BMN = quintic_step(x_BMN, triple)
    return x_BMN
