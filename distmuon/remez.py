"""Odd quintics that approximate 1 best on an interval, and compositions of them for Newton-Schulz.

A quintic (a, b, c) is p(x) = a x + b x^3 + c x^5; singular values move by it in one Newton-Schulz step.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from distmuon.errors import ConfigError

Quintic = tuple[float, float, float]

# p(1) = 1 and p'(1) = p''(1) = 0: the limit of the best quintic for an interval that shrinks to 1.
TAYLOR: Quintic = (15 / 8, -5 / 4, 3 / 8)
# Relative width below which TAYLOR is the best quintic to 8 decimals (the difference is quadratic in the width)
# and the exchange no longer is (its rounding error grows with the inverse square of the width).
NARROW = 1e-4
# The exchange converges quadratically: 4 rounds reach the rounding error on every interval.
ROUNDS = 8
# Rounding that gives every machine the same list, whatever the last bits of its LAPACK.
DECIMALS = 6
# Least ratio of the ends of an interval that a quintic is fitted to; arXiv 2505.16932, appendix G, uses 0.02407.
CUSHION = 0.024
MAX_STEPS = 20
MAX_MARGIN = 0.2


def evaluate(quintic: Quintic, x: float) -> float:
    """Value of a quintic.

    Args:
        quintic: (a, b, c).
        x: the input.

    Returns:
        a x + b x^3 + c x^5; infinite or NaN where that overflows.
    """
    a, b, c = quintic
    square = x * x
    return x * (a + square * (b + square * c))


def divide_input(quintic: Quintic, factor: float) -> Quintic:
    """Fold a division of the input into the coefficients.

    Args:
        quintic: (a, b, c) of p.
        factor: above 0.

    Returns:
        Coefficients of p(x / factor).
    """
    a, b, c = quintic
    return a / factor, b / factor**3, c / factor**5


def best_quintic(lower: float, upper: float) -> Quintic:
    """The odd quintic p with the least largest |1 - p(x)| on an interval.

    Args:
        lower: left end, above 0.
        upper: right end, above ``lower``.

    Returns:
        (a, b, c); p equioscillates at 4 points, the ends among them. Intervals narrower than ``NARROW`` get ``TAYLOR``
        scaled to the middle.

    Raises:
        ConfigError: the interval is not one of positive numbers.

    Source: Remez exchange; arXiv 2505.16932, section 4.2.
    """
    if not 0 < lower < upper < math.inf:
        raise ConfigError(f"[lower, upper] = [{lower:g}, {upper:g}] is not legal: it must be 0 < lower < upper.")
    if upper - lower <= NARROW * upper:
        return divide_input(TAYLOR, (lower + upper) / 2)
    # p = x (u + v t + w t^2) in t = (x^2 - middle) / half, which stays well conditioned on a narrow interval.
    middle, half = (upper**2 + lower**2) / 2, (upper**2 - lower**2) / 2
    x = np.array([lower, (3 * lower + upper) / 4, (lower + 3 * upper) / 4, upper])
    for _ in range(ROUNDS):
        t = (x**2 - middle) / half
        # p(x) + e = 1, p(x) - e = 1, ... in turn; the unknowns are u, v, w and the error e.
        u, v, w, _ = np.linalg.solve(np.stack([x, x * t, x * t**2, [1, -1, 1, -1]], axis=1), np.ones(4))
        # Inner extrema: p' = 0 is a quadratic equation in t.
        square, linear = 5 * half * w, 3 * half * v + 4 * middle * w
        root = np.sqrt(linear**2 - 4 * square * (half * u + 2 * middle * v))
        inner = (-linear + np.array([-root, root])) / (2 * square)
        x[1:3] = np.sqrt(middle + half * inner)
    b, c = v / half - 2 * w * middle / half**2, w / half**2
    return float(u - v * middle / half + w * (middle / half) ** 2), float(b), float(c)


@functools.cache
def optimal_composition(steps: int, lower: float, margin: float = 0.0, cushion: float = CUSHION) -> tuple[Quintic, ...]:
    """Quintics that, one after the other, take [lower, 1] as close to 1 as ``steps`` quintics can.

    Each is the best one for the interval that the ones before it map [lower, 1] into. The margin divides the input of
    every quintic but the last by 1 + margin, so that rounding cannot push a singular value out of its interval, and the
    next interval is the image under the divided quintic.

    Args:
        steps: number of quintics, 1 to 20.
        lower: smallest singular value of interest, in (0, 1); smaller ones grow too, but are left below 1.
        margin: relative overshoot that each quintic but the last tolerates in its input, 0 to 0.2; 0 is for study, it
            does not even absorb the rounding of these coefficients over many steps.
        cushion: quintics are fitted to no wider an interval than [cushion * upper, upper], then rescaled to be centred
            on 1 over the whole interval; keeps them from taking large singular values to almost 0.

    Returns:
        (a, b, c) per step, rounded to 6 decimals.

    Raises:
        ConfigError: an argument is out of range.

    Source: N. Amsel et al., "The Polar Express", arXiv 2505.16932, theorem 4.1 and section 4.4.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps = {steps} is not legal: it must be 1 to {MAX_STEPS}.")
    if not 0 < lower < 1:
        raise ConfigError(f"lower = {lower:g} is not legal: it must be above 0 and below 1.")
    if not 0 <= margin <= MAX_MARGIN:
        raise ConfigError(f"margin = {margin:g} is not legal: it must be 0 to {MAX_MARGIN}.")
    if not 0 <= cushion < 1:
        raise ConfigError(f"cushion = {cushion:g} is not legal: it must be at least 0 and below 1.")
    quintics, upper = [], 1.0
    for step in range(steps):
        p = best_quintic(max(lower, cushion * upper), upper) if lower < upper else TAYLOR
        if cushion * upper > lower:
            centre = (evaluate(p, lower) + evaluate(p, upper)) / 2
            p = (p[0] / centre, p[1] / centre, p[2] / centre)
        if step < steps - 1:
            p = divide_input(p, 1 + margin)
        quintics.append((round(p[0], DECIMALS), round(p[1], DECIMALS), round(p[2], DECIMALS)))
        lower = evaluate(p, lower)
        upper = 2 - lower
    return tuple(quintics)
