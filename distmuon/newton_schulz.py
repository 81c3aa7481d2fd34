"""Orthogonalization of batches of matrices by Newton-Schulz iteration.

Shapes: B matrices, M rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.coefficients import coefficients
from distmuon.config import NewtonSchulz
from distmuon.errors import ParameterError
from distmuon.kernels import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Precision of Newton-Schulz inputs before they are normalized; float16 would overflow or underflow there.
INPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}


def orthogonalize(x: Tensor, ns: NewtonSchulz | None = None) -> Tensor:
    """Replace each matrix by an approximation of its polar factor UV^T.

    Args:
        x: [..., M, N], any floating dtype. Not written to.
        ns: settings; None means ``NewtonSchulz()``.

    Returns:
        [..., M, N] in ``ns.dtype``. A zero matrix stays zero, a non-finite one becomes non-finite.

    Raises:
        ParameterError: x has fewer than two dimensions or is not floating point.
    """
    ns = ns or NewtonSchulz()
    if x.ndim < 2 or not x.is_floating_point():
        raise ParameterError(
            f"orthogonalize got a {x.ndim}-D {x.dtype} tensor; it takes floating-point [..., M, N] matrices."
        )
    if x.numel() == 0:
        return x.to(DTYPES[ns.dtype], copy=True)
    x_BMN = normalize(x.reshape(-1, *x.shape[-2:])).to(DTYPES[ns.dtype])
    tall = x.shape[-2] > x.shape[-1]
    o_BMN = reference.newton_schulz(x_BMN.mT if tall else x_BMN, coefficients(ns))
    return (o_BMN.mT if tall else o_BMN).reshape(x.shape)


def normalize(x_BMN: Tensor) -> Tensor:
    """Divide each matrix by its Frobenius norm, in float32 and without overflow or underflow.

    Args:
        x_BMN: [B, M, N], any floating dtype, not empty. Not written to.

    Returns:
        [B, M, N] float32 with norm 1; a zero matrix stays zero.
    """
    x_BMN = x_BMN if x_BMN.dtype == torch.float64 else x_BMN.float()
    largest_B11 = x_BMN.abs().amax(dim=(-2, -1), keepdim=True)
    x_BMN = (x_BMN / torch.where(largest_B11 == 0, 1.0, largest_B11)).float()
    # float64, so that the sum's order, which depends on the batch, cannot reach the float32 result.
    norm_B11 = x_BMN.double().square().sum(dim=(-2, -1), keepdim=True).sqrt().float()
    return x_BMN / torch.where(norm_B11 == 0, 1.0, norm_B11)
