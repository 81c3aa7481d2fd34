"""Newton-Schulz coefficient presets, each with its source."""

from __future__ import annotations

from distmuon.config import NewtonSchulz
from distmuon.kernels.reference import Quintic

# K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; also in arXiv 2502.16982.
# Tuned for slope at zero: singular values end in about [0.68, 1.13], not at 1.
PAPERS: Quintic = (3.4445, -4.7750, 2.0315)


def coefficients(ns: NewtonSchulz) -> tuple[Quintic, ...]:
    """List the (a, b, c) of every iteration.

    Args:
        ns: the Newton-Schulz settings.

    Returns:
        ``ns.steps`` triples.
    """
    return (PAPERS,) * ns.steps
