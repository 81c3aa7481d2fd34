"""Newton-Schulz in segments: X <- p_T(...p_1(X)) for odd quintics p, by products of small symmetric matrices.

A segment of one step is the plain iteration. A longer one is Gram Newton-Schulz: it iterates on R = XX^T, collects the
factor Q of X, and multiplies X once, at its end (a restart). Shapes: B matrices, M rows, N >= M columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmuon.coefficients import Quintic, Start
from distmuon.kernels.products import HALF_SQUARE, Products

# Rounding of R and R^2 may shrink the estimate of the spectral norm: keep it an upper bound.
SCHATTEN_MARGIN = 1.005
# Below the norm of any prescaled matrix but zero; its inverse stays in the range of 16 bits, its fifth power finite.
SMALLEST_NORM = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-20, torch.float32: 2.0**-20}


@dataclass(frozen=True)
class Schedule:
    """Which polynomials are applied, and how."""

    quintics: tuple[Quintic, ...]
    """(a, b, c) of every step."""
    segments: tuple[int, ...]
    """Number of steps of every segment; all ones is the plain iteration."""
    start: Start
    """Norm that bounds the spectral norm of the input from above."""


def iterate(x_BMN: Tensor, schedule: Schedule, products: Products) -> Tensor:
    """Run all segments.

    Args:
        x_BMN: [B, M, N] in the working dtype, M <= N, scaled as ``newton_schulz.prescale`` does. Not written to.
        schedule: the steps.
        products: the device's matrix products.

    Returns:
        [B, M, N] in the same dtype.

    Source: K. Jordan et al., "Muon", 2024 (plain); Dao-AILab, "Gram Newton-Schulz", 2025 (Gram).
    """
    done = 0
    for length in schedule.segments:
        quintics = schedule.quintics[done : done + length]
        if done == 0:
            x_BMN = _first_segment(x_BMN, quintics, schedule.start, products)
        elif length == 1:
            x_BMN = _step(x_BMN, quintics[0], products)
        else:
            x_BMN = _gram_segment(x_BMN, quintics, products)
        done += length
    return x_BMN


def _factor(gram_BMM: Tensor, b: float, c: float, products: Products) -> Tensor:
    """Compute bR + cR^2; cubics need no square."""
    return gram_BMM * b if c == 0 else products.product(gram_BMM, gram_BMM, gram_BMM, c, b)


def _step(x_BMN: Tensor, quintic: Quintic, products: Products) -> Tensor:
    """X <- aX + (bR + cR^2)X."""
    a, b, c = quintic
    return products.add_product(x_BMN, _factor(products.gram(x_BMN), b, c, products), a)


def _gram_segment(x_BMN: Tensor, quintics: Sequence[Quintic], products: Products) -> Tensor:
    (a, b, c), *rest = quintics
    gram_BMM = products.gram(x_BMN)
    z_BMM = _factor(gram_BMM, b, c, products)
    q_BMM = z_BMM.clone()
    q_BMM.diagonal(dim1=-2, dim2=-1).add_(a)
    return products.multiply(_collect(q_BMM, gram_BMM, z_BMM, a, rest, products), x_BMN)


def _first_segment(x_BMN: Tensor, quintics: Sequence[Quintic], start: Start, products: Products) -> Tensor:
    """The segment that also scales its input, by folding the scale into coefficients: sX has s^2 R.

    Powers of s are products: those of torch depend on the place of an element in its tensor, hence on the batch.
    """
    (a, b, c), *rest = quintics
    gram_BMM = products.gram(x_BMN)
    if start == "frobenius":
        s_B = frobenius_scale(gram_BMM)
        s2_B = s_B * s_B
        if not rest:
            p_BMM = _scaled_factor(gram_BMM, b * s2_B * s_B, c * s2_B * s2_B * s_B, products, cubic=c == 0)
            return products.add_product(x_BMN, p_BMM, (a * s_B).float())
        z_BMM = _scaled_factor(gram_BMM, b * s2_B, c * s2_B * s2_B, products, cubic=c == 0).float()
    else:
        stored = HALF_SQUARE if x_BMN.dtype == torch.float16 else 1.0
        square_BMM = products.product(gram_BMM, gram_BMM, None, stored, 0.0)
        s_B = schatten8_scale(square_BMM, stored)
        s2_B = s_B * s_B
        # Both products of the first polynomial exist by now: put it together here, in float32.
        z_BMM = square_BMM.float().mul_(_each(c / stored * s2_B * s2_B))
        z_BMM.add_(gram_BMM.to(torch.float32, copy=True).mul_(_each(b * s2_B)))
    q_BMM = z_BMM.clone() if rest else z_BMM
    q_BMM.diagonal(dim1=-2, dim2=-1).add_(a)
    q_BMM = q_BMM.mul_(_each(s_B)).to(x_BMN.dtype)
    if rest:
        gram_BMM = (gram_BMM * _each(s2_B)).to(x_BMN.dtype)
        q_BMM = _collect(q_BMM, gram_BMM, z_BMM.to(x_BMN.dtype), a, rest, products)
    return products.multiply(q_BMM, x_BMN)


def _scaled_factor(gram_BMM: Tensor, b_B: Tensor, c_B: Tensor, products: Products, cubic: bool) -> Tensor:
    """Compute bR + cR^2 with coefficients that differ by matrix."""
    if cubic:
        return (gram_BMM * _each(b_B)).to(gram_BMM.dtype)
    return products.product(gram_BMM, gram_BMM, gram_BMM, c_B.float(), b_B.float())


def _each(values_B: Tensor) -> Tensor:
    return values_B.float()[:, None, None]


def _collect(
    q_BMM: Tensor, gram_BMM: Tensor, z_BMM: Tensor, a: float, rest: Sequence[Quintic], products: Products
) -> Tensor:
    """Multiply the factors aI + Z of the remaining steps into Q; ``a`` and ``z_BMM`` come from the step before."""
    for following in rest:
        half_BMM = products.product(gram_BMM, z_BMM, gram_BMM, 1.0, a)
        gram_BMM = products.product(z_BMM, half_BMM, half_BMM, 1.0, a)
        a, b, c = following
        z_BMM = _factor(gram_BMM, b, c, products)
        q_BMM = products.product(q_BMM, z_BMM, q_BMM, 1.0, a)
    return q_BMM


def frobenius_scale(gram_BMM: Tensor) -> Tensor:
    """Scale that brings the Frobenius norm, tr(R)^(1/2), to 1.

    Args:
        gram_BMM: [B, M, M] R = XX^T.

    Returns:
        [B] float64; finite for a zero matrix.
    """
    # Summed in float64: the order of the sum, which depends on the batch, cannot reach the float32 result.
    squares_B = gram_BMM.diagonal(dim1=-2, dim2=-1).double().sum(dim=-1)
    return squares_B.clamp(min=SMALLEST_NORM[gram_BMM.dtype] ** 2).rsqrt()


def schatten8_scale(square_BMM: Tensor, stored: float = 1.0) -> Tensor:
    """Scale that brings 1.005 times the Schatten-8 norm, ||R^2||_F^(1/4), to 1.

    No singular value exceeds that norm, and the largest is much closer to it than to the Frobenius norm.

    Args:
        square_BMM: [B, M, M] R^2 times ``stored``.
        stored: factor that R^2 is stored with.

    Returns:
        [B] float64; finite for a zero matrix.
    """
    rows_BM: Tensor = torch.linalg.vector_norm(square_BMM.float(), dim=-1).double()
    norm_B = (rows_BM.square().sum(dim=-1).sqrt() / stored).sqrt().sqrt()
    return (SCHATTEN_MARGIN * norm_B).clamp(min=SMALLEST_NORM[square_BMM.dtype]).reciprocal()
