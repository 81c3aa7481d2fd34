"""Newton-Schulz in segments: X <- p_T(...p_1(X)) for odd quintics p, by products of small symmetric matrices.

A segment of one step is the plain iteration. A longer one is Gram Newton-Schulz: it iterates on R = XX^T, collects the
factors W = aI + bR + cR^2 of X in Q, and multiplies X once, at its end (a restart).

Shapes: B matrices, M rows, N >= M columns.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmuon.coefficients import Quintic, Start
from distmuon.kernels.products import Products

# Rounding of R and R^2 may shrink the estimate of the spectral norm: keep it an upper bound.
SCHATTEN_MARGIN = 1.005
# R^2 times this is what float16 stores: with a Frobenius norm of at most 32, R^2 alone would overflow.
HALF_SQUARE = 2.0**-5
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
    steps = segments(x_BMN, schedule, products)
    gram_BMM = next(steps)
    while True:
        try:
            gram_BMM = steps.send(gram_BMM)
        except StopIteration as end:
            done: Tensor = end.value
            return done


def segments(x_BMN: Tensor, schedule: Schedule, products: Products) -> Generator[Tensor, Tensor, Tensor]:
    """Run all segments, with XX^T left to the caller to complete: X may be a slice of the columns.

    Args:
        x_BMN: as for ``iterate``; N may be less than M.
        schedule: the steps.
        products: the device's matrix products.

    Yields:
        [B, M, M] XX^T of these columns, once a segment; it is to be sent back summed over all columns.

    Returns:
        [B, M, N] in the same dtype.
    """
    done = 0
    for length in schedule.segments:
        quintics = schedule.quintics[done : done + length]
        gram_BMM = yield products.gram(x_BMN)
        if done > 0 and length == 1:
            x_BMN = _step(x_BMN, gram_BMM, quintics[0], products)
        else:
            if done == 0:
                w_BMM = _starting_factor(gram_BMM, quintics[0], schedule.start, products)
            else:
                w_BMM = products.polynomial(gram_BMM, *quintics[0])
            x_BMN = products.multiply(_collect(w_BMM, gram_BMM, quintics[1:], products), x_BMN)
        done += length
    return x_BMN


def _step(x_BMN: Tensor, gram_BMM: Tensor, quintic: Quintic, products: Products) -> Tensor:
    """X <- aX + (bR + cR^2)X."""
    a, b, c = quintic
    return products.add_product(x_BMN, products.polynomial(gram_BMM, 0.0, b, c), a)


def _starting_factor(gram_BMM: Tensor, quintic: Quintic, start: Start, products: Products) -> Tensor:
    """W = s(aI + b s^2 R + c s^4 R^2): the first step and, folded into its coefficients, the scale of the input."""
    a, b, c = quintic
    stored = HALF_SQUARE if gram_BMM.dtype == torch.float16 else 1.0
    if start == "frobenius":
        square_BMM = products.square(gram_BMM, stored)
        s_B = frobenius_scale(gram_BMM)
    else:
        square_BMM, squares_B = products.square_norm(gram_BMM, stored)
        s_B = schatten8_scale(squares_B / stored**2, gram_BMM.dtype)
    # Not powers: torch's depend on the place of an element in its tensor, hence on the batch.
    s3_B = s_B * s_B * s_B
    return products.combine(gram_BMM, square_BMM, a * s_B, b * s3_B, c / stored * s3_B * s_B * s_B)


def _collect(w_BMM: Tensor, gram_BMM: Tensor, rest: Sequence[Quintic], products: Products) -> Tensor:
    """Multiply the factors W of a segment's remaining steps into Q, starting with the first step's.

    Each W belongs to the X that all factors before it gave, so it comes from the left; Q is not exactly symmetric, and
    what is unsymmetric in it counts.
    """
    q_BMM = w_BMM
    for quintic in rest:
        gram_BMM = products.product(w_BMM, products.product(gram_BMM, w_BMM))
        w_BMM = products.polynomial(gram_BMM, *quintic)
        q_BMM = products.multiply(w_BMM, q_BMM)
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


def schatten8_scale(squares_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale that brings 1.005 times the Schatten-8 norm, ||R^2||_F^(1/4), to 1.

    No singular value exceeds that norm, and the largest is much closer to it than to the Frobenius norm.

    Args:
        squares_B: [B] float64 ||R^2||_F^2.
        dtype: dtype of the iteration.

    Returns:
        [B] float64; finite for a zero matrix.
    """
    norm_B = squares_B.sqrt().sqrt().sqrt()
    return (SCHATTEN_MARGIN * norm_B).clamp(min=SMALLEST_NORM[dtype]).reciprocal()
