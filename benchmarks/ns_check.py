"""Exact results of Newton-Schulz, and the check that a candidate must pass before it is timed.

Shapes: B matrices, M rows, N columns, K = min(M, N) singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.coefficients import Quintic, Start
from distmuon.iteration import SCHATTEN_MARGIN

# Largest relative error, in the Frobenius norm. On ``graded`` matrices rounding to 16 bits costs up to 0.03, of 16 rows
# 0.05, and any two of the presets that are timed are 0.08 or more apart.
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.06, torch.float32: 1e-4}
# Decades that the rows of ``graded`` matrices span.
DECADES = 3


class WrongResultError(RuntimeError):
    """A candidate does not compute what it claims to."""


def graded(batch: int, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Draw matrices whose singular values span all of a preset's curve, so that presets can be told apart by results.

    Args:
        batch: B.
        rows: M.
        cols: N.
        seed: the same one gives the same matrices.

    Returns:
        [B, M, N] float32 on the CPU: independent normal entries, with vectors of the shorter side scaled by 1 to 1e-3.
    """
    short, long = sorted((rows, cols))
    x_BKL = torch.randn(batch, short, long, generator=torch.Generator().manual_seed(seed))
    x_BKL *= torch.logspace(0, -DECADES, short)[:, None]
    return (x_BKL if rows <= cols else x_BKL.mT).contiguous()


class Exact:
    """Exact polynomials of matrices, by eigenvalues in float64.

    Args:
        x_BMN: [B, M, N], any floating dtype.
    """

    def __init__(self, x_BMN: Tensor) -> None:
        self._tall = x_BMN.shape[-2] > x_BMN.shape[-1]
        self._x_BKN = (x_BMN.mT if self._tall else x_BMN).double()
        squares_BK, self._u_BKK = torch.linalg.eigh(self._x_BKN @ self._x_BKN.mT)
        self._sigma_BK = squares_BK.clamp(min=0).sqrt()

    def polynomial(self, quintics: tuple[Quintic, ...], start: Start) -> Tensor:
        """Apply quintics to singular values that are divided by a norm first.

        Args:
            quintics: (a, b, c) of every step.
            start: the norm.

        Returns:
            [B, M, N] float64.
        """
        power = 2 if start == "frobenius" else 8
        norm_B1 = self._sigma_BK.pow(power).sum(dim=-1, keepdim=True).pow(1 / power)
        if start == "schatten8":
            norm_B1 = SCHATTEN_MARGIN * norm_B1
        y_BK, gain_BK = self._sigma_BK / norm_B1, 1 / norm_B1.expand_as(self._sigma_BK)
        for a, b, c in quintics:
            factor_BK = a + b * y_BK**2 + c * y_BK**4
            y_BK, gain_BK = y_BK * factor_BK, gain_BK * factor_BK
        o_BKN: Tensor = (self._u_BKK * gain_BK[:, None, :]) @ (self._u_BKK.mT @ self._x_BKN)
        return o_BKN.mT if self._tall else o_BKN


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm.

    Args:
        found: any floating dtype.
        exact: the same shape in float64.

    Returns:
        The error; not a number where ``found`` is not finite.
    """
    return float((found.double() - exact).norm() / exact.norm())


def verify(name: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Refuse a wrong result.

    Args:
        name: the candidate.
        found: its result.
        exact: the exact one in float64.
        dtype: what the candidate computes in.

    Returns:
        The relative error.

    Raises:
        WrongResultError: it has another shape or exceeds ``TOLERANCE`` or is not finite.
    """
    if found.shape != exact.shape:
        raise WrongResultError(f'"{name}" returns {tuple(found.shape)} instead of {tuple(exact.shape)}.')
    relative = error(found, exact)
    # Not "exceeds": comparisons with what is not a number are false.
    if not relative <= TOLERANCE[dtype]:
        raise WrongResultError(
            f'"{name}" is off by {relative:.3g} of the exact result, and {TOLERANCE[dtype]:g} is legal for '
            f"{str(dtype).removeprefix('torch.')}; it is not worth timing."
        )
    return relative


def verify_equal(name: str, batched: Tensor, one_by_one: Tensor) -> None:
    """Refuse a batch that computes other bits than its matrices alone.

    Args:
        name: the candidate.
        batched: its result.
        one_by_one: what its matrices give one by one.

    Raises:
        WrongResultError: a bit differs.
    """
    if not torch.equal(batched, one_by_one):
        raise WrongResultError(f'"{name}" gives a matrix other bits in a batch than alone.')
