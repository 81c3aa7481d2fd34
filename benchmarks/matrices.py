"""Matrices that are hard to orthogonalize in 16 bits, with their exact polar factors, and what an answer is off by.

Shapes: M rows, N columns, R resolved singular values.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

# Below this share of the Frobenius norm no method of a few steps can lift a singular value to 1.
RESOLVED = 1e-3
SHAPES = ((128, 128), (256, 256), (256, 1024), (512, 512))
SEEDS = (0, 1)


def gaussian(m: int, n: int, rng: Generator) -> Tensor:
    """Independent normal entries."""
    return torch.randn(m, n, generator=rng)


def harmonic(m: int, n: int, rng: Generator) -> Tensor:
    """Singular values 1, 1/2, 1/3, ..."""
    return _with_spectrum(1 / torch.arange(1, min(m, n) + 1), m, n, rng)


def low_rank(m: int, n: int, rng: Generator) -> Tensor:
    """A product of rank min(m, n) / 8 under noise of 1 %."""
    rank = min(m, n) // 8
    product = torch.randn(m, rank, generator=rng) @ torch.randn(rank, n, generator=rng) / math.sqrt(rank)
    return product + 0.01 * gaussian(m, n, rng)


def rank_one(m: int, n: int, rng: Generator) -> Tensor:
    """An outer product under noise of 0.1 %."""
    return torch.randn(m, 1, generator=rng) * torch.randn(1, n, generator=rng) + 1e-3 * gaussian(m, n, rng)


def log_uniform(m: int, n: int, rng: Generator) -> Tensor:
    """Singular values spread evenly over six decades."""
    return _with_spectrum(torch.logspace(0, -6, min(m, n)), m, n, rng)


def sparse(m: int, n: int, rng: Generator) -> Tensor:
    """One entry in a hundred: zero rows, equal singular values, and products without rounding error to dither them."""
    kept = torch.rand(m, n, generator=rng) < 0.01
    return torch.where(kept, gaussian(m, n, rng), 0.0)


def heavy_tailed(m: int, n: int, rng: Generator) -> Tensor:
    """Student's t with two degrees of freedom: entries of infinite variance."""
    chi_MN = gaussian(m, n, rng).square() + gaussian(m, n, rng).square()
    return gaussian(m, n, rng) / (chi_MN / 2).sqrt()


def correlated(m: int, n: int, rng: Generator) -> Tensor:
    """Rows with correlation 0.9 to the next, as an autoregressive process."""
    distance_MM = (torch.arange(m)[:, None] - torch.arange(m)).abs()
    factor_MM: Tensor = torch.linalg.cholesky(0.9 ** distance_MM.double()).float()
    return factor_MM @ gaussian(m, n, rng)


def clustered(m: int, n: int, rng: Generator) -> Tensor:
    """Three clusters of equal singular values, 1, 0.1 and 0.01."""
    return _with_spectrum(torch.tensor([1.0, 0.1, 0.01]).repeat(min(m, n))[: min(m, n)], m, n, rng)


def cauchy(m: int, n: int, rng: Generator) -> Tensor:
    """Cauchy entries: a few of them are most of the norm."""
    return gaussian(m, n, rng) / gaussian(m, n, rng)


def gradient(m: int, n: int, rng: Generator) -> Tensor:
    """Errors times rectified activations, as a linear layer's gradient; their mean is most of the norm."""
    tokens = 2 * max(m, n)
    hidden = torch.randn(tokens, n // 4, generator=rng) @ torch.randn(n // 4, n, generator=rng) / math.sqrt(n // 4)
    errors = torch.randn(tokens, m, generator=rng) * torch.randn(tokens, 1, generator=rng).mul(1.5).exp()
    return errors.mT @ hidden.relu()


Family = Callable[[int, int, Generator], Tensor]
HARD: tuple[Family, ...] = (
    gaussian,
    harmonic,
    low_rank,
    rank_one,
    log_uniform,
    sparse,
    heavy_tailed,
    correlated,
    clustered,
)
# One direction is most of the norm, so that resolved singular values lie below the least that five steps can lift to 1.
DOMINATED: tuple[Family, ...] = (cauchy, gradient)


class Sample(NamedTuple):
    """A matrix and the singular vectors that an answer is judged by."""

    name: str
    x_MN: Tensor
    u_MR: Tensor
    v_RN: Tensor


@dataclass(frozen=True)
class Accuracy:
    """How far a matrix O is from the polar factor of X; all infinite where O is not finite."""

    rms_resolved: float
    """Root mean square of u'Ov - 1 over the resolved pairs (u, v) of singular vectors of X."""
    sigma_max: float
    """Largest singular value of O."""
    sigma_min: float
    """Smallest singular value of O."""
    orthogonality: float
    """Frobenius norm of OO^T - I over the square root of the number of rows, rows being the shorter side."""


def sample(family: Family, m: int, n: int, seed: int) -> Sample:
    """Draw a matrix and decompose it in float64.

    Args:
        family: draws an [M, N] float32 matrix.
        m: rows.
        n: columns.
        seed: the same seed gives the same matrix.

    Returns:
        The sample.
    """
    name = f"{family.__name__} {m}x{n} #{seed}"
    # From the name, so that families and shapes do not share their random numbers.
    x_MN = family(m, n, Generator().manual_seed(zlib.crc32(name.encode())))
    u_MK, sigma_K, v_KN = torch.linalg.svd(x_MN.double(), full_matrices=False)
    resolved = int((sigma_K >= RESOLVED * torch.linalg.vector_norm(sigma_K)).sum())
    return Sample(name, x_MN, u_MK[:, :resolved], v_KN[:resolved])


def samples(families: Iterable[Family]) -> list[Sample]:
    """Draw every family in every shape and with every seed; 72 matrices of ``HARD`` take some seconds.

    Args:
        families: ``HARD`` or ``DOMINATED``.

    Returns:
        Eight samples of each family.
    """
    return [sample(family, m, n, seed) for family in families for m, n in SHAPES for seed in SEEDS]


def measure(x: Sample, o_MN: Tensor) -> Accuracy:
    """Compare an orthogonalized matrix with the exact polar factor.

    Args:
        x: what was orthogonalized.
        o_MN: the answer, [M, N], any floating dtype.

    Returns:
        The accuracy.
    """
    o_MN = o_MN.double()
    if not o_MN.isfinite().all():
        return Accuracy(math.inf, math.inf, math.inf, math.inf)
    aligned_R = ((x.u_MR.mT @ o_MN) * x.v_RN).sum(dim=1)
    short_MN = o_MN if o_MN.shape[0] <= o_MN.shape[1] else o_MN.mT
    squares_M = torch.linalg.eigvalsh(short_MN @ short_MN.mT).clamp(min=0)
    return Accuracy(
        rms_resolved=float((aligned_R - 1).square().mean().sqrt()),
        sigma_max=float(squares_M.max().sqrt()),
        sigma_min=float(squares_M.min().sqrt()),
        orthogonality=float((squares_M - 1).square().mean().sqrt()),
    )


def _with_spectrum(sigma_K: Tensor, m: int, n: int, rng: Generator) -> Tensor:
    u_MK: Tensor = torch.linalg.qr(torch.randn(m, len(sigma_K), generator=rng, dtype=torch.float64)).Q
    v_NK: Tensor = torch.linalg.qr(torch.randn(n, len(sigma_K), generator=rng, dtype=torch.float64)).Q
    return (u_MK * sigma_K.double() @ v_NK.mT).float()
