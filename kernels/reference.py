"""Plain torch twins of the Triton kernels: their specification, and the oracle of their tests.

Shapes: B matrices, M rows, N columns, K the side that a product sums over. Twins compute in float32 and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one block of ``momentum_cast``; each block reports its own part of the norm.
NORM_BLOCK = 4096


def symmetric_product(a_BMK: Tensor, b_BMK: Tensor, c_BMM: Tensor | None, scalars: Tensor) -> Tensor:
    """Compute Y = alpha A B^T + beta C + gamma I, for operands that make Y symmetric.

    Args:
        a_BMK: [B, M, K], 16-bit or float32. Not written to.
        b_BMK: [B, M, K] in the same dtype. Not written to.
        c_BMM: [B, M, M] symmetric, in the same dtype; None leaves the term out. Not written to.
        scalars: float32 [3] or [B, 3] on the same device: alpha, beta, gamma.

    Returns:
        [B, M, M] in the same dtype, symmetric bit for bit.
    """
    return symmetric_product_norm(a_BMK, b_BMK, c_BMM, scalars)[0]


def symmetric_product_norm(
    a_BMK: Tensor, b_BMK: Tensor, c_BMM: Tensor | None, scalars: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``symmetric_product`` and the squared Frobenius norm of each result before it is rounded.

    Args:
        a_BMK: as in ``symmetric_product``.
        b_BMK: as in ``symmetric_product``.
        c_BMM: as in ``symmetric_product``.
        scalars: as in ``symmetric_product``.

    Returns:
        [B, M, M] results and [B] float32 sums of squares.
    """
    alpha, beta, gamma = scalars.expand(a_BMK.shape[0], 3)[..., None, None].unbind(1)
    y_BMM = alpha * torch.bmm(a_BMK.float(), b_BMK.float().mT)
    if c_BMM is not None:
        y_BMM = y_BMM + beta * c_BMM.float()
    y_BMM = y_BMM + gamma * torch.eye(y_BMM.shape[-1], dtype=torch.float32, device=y_BMM.device)
    y_BMM = y_BMM.tril() + y_BMM.tril(-1).mT
    return y_BMM.to(a_BMK.dtype), y_BMM.square().sum(dim=(-2, -1))


def add_product(x_BMN: Tensor, p_BMM: Tensor, scalars: Tensor) -> Tensor:
    """Compute Y = a X + P X.

    Args:
        x_BMN: [B, M, N], 16-bit or float32. Not written to.
        p_BMM: [B, M, M] in the same dtype. Not written to.
        scalars: float32 [1] or [B, 1] on the same device: a.

    Returns:
        [B, M, N] in the same dtype.
    """
    x = x_BMN.float()
    return (scalars.expand(x.shape[0], 1)[..., None] * x + torch.bmm(p_BMM.float(), x)).to(x_BMN.dtype)


def momentum_cast(
    momentum: Tensor, grad: Tensor, mu: float, nesterov: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Advance heavy-ball momentum, cast the Newton-Schulz input, and measure it block by block.

    Args:
        momentum: flat float32, updated in place: m <- mu m + g.
        grad: flat float32 of the same length. Not written to.
        mu: momentum coefficient in [0, 1).
        nesterov: return g + mu m instead of m.
        dtype: dtype of the input.

    Returns:
        The input u, and for every block of ``NORM_BLOCK`` elements of it (float32 [blocks, 2]) the largest |u| and the
        sum of squares of u / 2^e, where 2^e is the largest power of two up to it, but at least 2^-126.

    Source: Moonlight (arXiv 2502.16982), equation 1 with its Nesterov footnote.
    """
    momentum.mul_(mu).add_(grad)
    u = (momentum.mul(mu).add_(grad) if nesterov else momentum).to(dtype, copy=True)
    return u, norm_partials(u)


def norm_partials(u: Tensor) -> Tensor:
    """Largest magnitude and scaled sum of squares of every block of ``NORM_BLOCK`` elements.

    Args:
        u: flat, any floating dtype. Not written to.

    Returns:
        float32 [blocks, 2], as ``momentum_cast`` describes.
    """
    padded = u.new_zeros(-(-u.numel() // NORM_BLOCK) * NORM_BLOCK, dtype=torch.float32)
    padded[: u.numel()] = u.float()
    blocks = padded.view(-1, NORM_BLOCK)
    largest = blocks.abs().amax(dim=1)
    return torch.stack([largest, (blocks / power_of_two(largest)[:, None]).square().sum(dim=1)], dim=1)


def power_of_two(x: Tensor) -> Tensor:
    """Largest power of two up to each magnitude, so that dividing by it rounds nothing.

    Args:
        x: bfloat16 or float32. Not written to.

    Returns:
        The same shape and dtype; 2^-126, the least normal number, for what is smaller, and infinity for what is not
        finite.
    """
    # The bits of the exponent alone.
    integer, exponent = (torch.int16, 0x7F80) if x.dtype == torch.bfloat16 else (torch.int32, 0x7F800000)
    return (x.view(integer) & exponent).view(x.dtype).clamp(min=2.0**-126)
