"""Which form of Newton-Schulz a shape takes, by counting floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distmuon.coefficients import GENERATED
from distmuon.iteration import Schedule
from distmuon.ns_settings import NewtonSchulz

# (rows, inner side) -> part of a symmetric product that is computed.
Fraction = Callable[[int, int], float]


def flops(rows: int, cols: int, segments: Sequence[int], fraction: Fraction, cubics: int = 0) -> float:
    """Count the floating-point operations for one matrix, two per multiply-add.

    Args:
        rows: M, the shorter side.
        cols: N, the longer side.
        segments: number of steps of every segment.
        fraction: part of a symmetric product that the device computes; 1 everywhere counts all.
        cubics: number of steps but the first with c = 0, which need no square of the Gram matrix.

    Returns:
        For every segment of L steps: XX^T, 3L - 2 symmetric products and L - 1 others of M x M matrices, and one
        product with X.
    """
    gram = 2 * rows**2 * cols * fraction(rows, cols)
    full = 2 * rows**3
    square = full * fraction(rows, rows)
    last = 2 * rows**2 * cols
    return sum(gram + (3 * length - 2) * square + (length - 1) * full + last for length in segments) - cubics * square


def make_schedule(ns: NewtonSchulz, rows: int, cols: int, fraction: Fraction) -> Schedule:
    """Choose the form for a shape.

    Args:
        ns: settings.
        rows: M, the shorter side.
        cols: N, the longer side.
        fraction: part of a symmetric product that the device computes.

    Returns:
        The plain form, or the Gram form where it is asked for, or where "auto" finds it safe and cheaper.
    """
    plain = ns.polynomials("plain")
    chosen = Schedule(plain.quintics, (1,) * len(plain.quintics), plain.start)
    # Left to itself, no matrix gets less exact by its shape: float32 asks for exactness, the margin that Gram needs
    # costs generated presets theirs, and lists of a user's own were not tried on sparse matrices.
    exact = ns.dtype == "float32" or ns.preset in (*GENERATED, "custom")
    segments = ns.gram_segments() if ns.form == "gram" or (ns.form == "auto" and not exact) else None
    if segments is None:
        return chosen
    cheaper = flops(rows, cols, segments, fraction) < flops(rows, cols, chosen.segments, fraction)
    if ns.form == "gram" or cheaper:
        gram = ns.polynomials("gram")
        chosen = Schedule(gram.quintics, segments, gram.start)
    return chosen
