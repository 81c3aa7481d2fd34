"""Newton-Schulz coefficient presets and the guard that keeps an update from being an ascent.

A quintic (a, b, c) takes every singular value x to a x + b x^3 + c x^5; a preset is one quintic per step.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from distmuon.errors import ConfigError
from distmuon.published import PUBLISHED
from distmuon.remez import MAX_MARGIN, MAX_STEPS, evaluate, optimal_composition
from distmuon.remez import Quintic as Quintic

PresetName = Literal[
    "papers", "you", "polar_express", "cans", "cubic5", "papers8+2", "opt4", "opt5", "opt6", "optimal", "custom"
]
Start = Literal["frobenius", "schatten8"]

# Largest legal output. cubic5 is made for outputs up to 1.3; what exceeds 1.31 does so on its way to infinity.
LIMIT = 1.31
# Inputs up to this must have legal outputs: 1, plus the rounding of a matrix and its norm to 16 bits.
LARGEST_INPUT = 1.01
# Where the search for illegal inputs ends.
SEARCH_END = 2.0
# The plain form corrects its own rounding. The Gram form does not: over 8,720 small, mostly sparse bfloat16 matrices,
# a margin of 5 % let the worst singular value of opt5 grow to 1.61, 8 % to 1.07.
PLAIN_MARGIN = 0.01
GRAM_MARGIN = 0.08
# Steps (None: any, by default 5) and lower bound; fewer steps reach less far down.
GENERATED: dict[str, tuple[int | None, float]] = {
    "opt4": (4, 3e-3),
    "opt5": (5, 2.5e-3),
    "opt6": (6, 2e-3),
    "optimal": (None, 2.5e-3),
}
# Which presets take an argument that most do not.
_TAKERS = {"lower": ("optimal",), "margin": tuple(GENERATED), "coefficients": ("custom",), "start": ("custom",)}


@dataclass(frozen=True)
class Preset:
    """Coefficients of a Newton-Schulz iteration."""

    quintics: tuple[Quintic, ...]
    """(a, b, c) per step; safety factors on the input are folded in."""
    start: Start
    """What the matrix is divided by first: its Frobenius norm, or 1.005 times its Schatten-8 norm."""
    source: str
    """Where the coefficients come from."""


@functools.cache
def preset(
    name: PresetName,
    steps: int | None = None,
    lower: float | None = None,
    margin: float | None = None,
    coefficients: tuple[Quintic, ...] | None = None,
    start: Start | None = None,
) -> Preset:
    """Look up or generate the coefficients of a preset.

    Args:
        name: the preset.
        steps: number of steps; None takes the preset's own, 5 where it has several.
        lower: "optimal" only: least singular value that is to reach 1, as a fraction of the Schatten-8 norm; None is
            0.0025.
        margin: generated presets only: overshoot that each step tolerates in its input, 0.01 to 0.2; None is 0.01,
            enough for the plain form; the Gram form needs 0.08.
        coefficients: "custom" only: (a, b, c) per step.
        start: "custom" only: what matrices are divided by first; None is "frobenius".

    Returns:
        The preset; it has passed ``check_ascent``.

    Raises:
        ConfigError: the preset does not have that number of steps or does not take an argument, an argument is out of
            range, or the coefficients fail ``check_ascent``.
    """
    given = {"lower": lower, "margin": margin, "coefficients": coefficients, "start": start}
    for field, value in given.items():
        if value is not None and name not in _TAKERS[field]:
            raise ConfigError(
                f'{field} = {value} is not legal with preset "{name}": only {", ".join(_TAKERS[field])} can have it; '
                f"leave {field} out."
            )
    if name == "custom":
        return _custom(steps, coefficients or (), start or "frobenius")
    if name in GENERATED:
        return _generate(name, steps, lower, PLAIN_MARGIN if margin is None else margin)
    published = PUBLISHED[name]
    _check_steps(name, steps, published.least, len(published.quintics))
    return Preset(published.quintics[: steps or published.default], "frobenius", published.source)


def check_ascent(quintics: tuple[Quintic, ...]) -> None:
    """Refuse coefficients that could turn an update against the gradient or blow it up.

    Args:
        quintics: (a, b, c) per step, for inputs up to 1.

    Raises:
        ConfigError: an input in [0, 1.01] has an output below 0 or above 1.31; names the worst.
    """
    if _is_legal(output_range(quintics, LARGEST_INPUT)):
        return
    first = min(valid_up_to(quintics), LARGEST_INPUT)
    inputs = [first + (LARGEST_INPUT - first) * i / 1000 for i in range(1001)]
    worst, output = max(((x, _compose(quintics, x)) for x in inputs), key=lambda pair: _violation(pair[1]))
    raise ConfigError(
        f"coefficients = [{quintics[0]}, ...] are not legal: they take the singular value {worst:.3f} to {output:.4g}, "
        f"but must take [0, {LARGEST_INPUT}] into [0, {LIMIT}]; divide a, b, c of the first step by s, s^3, s^5 with "
        f's > 1, or take preset "optimal".'
    )


def gram_margin(quintics: tuple[Quintic, ...]) -> float:
    """How far singular values may exceed 1 before outputs become illegal.

    The Gram form steps on XX^T alone, where rounding adds up until X is formed again; it needs ``GRAM_MARGIN``.

    Args:
        quintics: (a, b, c) per step.

    Returns:
        ``valid_up_to(quintics) - 1``.
    """
    return valid_up_to(quintics) - 1


@functools.cache
def valid_up_to(quintics: tuple[Quintic, ...]) -> float:
    """The end of the interval of inputs on which every output is legal.

    Args:
        quintics: (a, b, c) per step.

    Returns:
        The largest x <= 2 such that [0, x] is taken into [0, 1.31], to 12 decimals; 0 if there is none.
    """
    legal, illegal = 0.0, SEARCH_END
    if _is_legal(output_range(quintics, illegal)):
        return illegal
    # Ranges are nested, so bisection finds the end.
    while illegal - legal > 1e-12:
        middle = (legal + illegal) / 2
        if _is_legal(output_range(quintics, middle)):
            legal = middle
        else:
            illegal = middle
    return legal


def output_range(quintics: tuple[Quintic, ...], upper: float) -> tuple[float, float]:
    """Exact range of the composed quintics on an interval of inputs.

    Args:
        quintics: (a, b, c) per step.
        upper: the inputs are [0, upper].

    Returns:
        Least and largest output; infinite if a value overflows on the way.
    """
    low, high = 0.0, upper
    for quintic in quintics:
        # A continuous function takes an interval to an interval, whose ends it has at ends or critical points.
        inner = [x for point in _critical_points(quintic) for x in (-point, point) if low < x < high]
        outputs = [evaluate(quintic, x) for x in (low, high, *inner)]
        if not all(map(math.isfinite, outputs)):
            return -math.inf, math.inf
        low, high = min(outputs), max(outputs)
    return low, high


def _critical_points(quintic: Quintic) -> list[float]:
    """Positive roots of p'(x) = a + 3b x^2 + 5c x^4."""
    a, b, c = quintic
    discriminant = 9 * b * b - 20 * a * c
    if not discriminant >= 0:
        return []
    # The two roots x^2 of the quadratic equation in the forms that do not cancel; c = 0 leaves the second.
    half = -(3 * b + math.copysign(math.sqrt(discriminant), b)) / 2
    squares = [numerator / denominator for numerator, denominator in ((half, 5 * c), (a, half)) if denominator]
    return [math.sqrt(square) for square in squares if 0 < square < math.inf]


def _compose(quintics: tuple[Quintic, ...], x: float) -> float:
    for quintic in quintics:
        x = evaluate(quintic, x)
    return x


def _is_legal(outputs: tuple[float, float]) -> bool:
    return outputs[0] >= 0 and outputs[1] <= LIMIT


def _violation(output: float) -> float:
    return max(-output, output - LIMIT) if math.isfinite(output) else math.inf


def _custom(steps: int | None, quintics: tuple[Quintic, ...], start: Start) -> Preset:
    if not 1 <= len(quintics) <= MAX_STEPS:
        raise ConfigError(
            f'coefficients = {quintics} are not legal: preset "custom" needs 1 to {MAX_STEPS} triples (a, b, c); '
            f"give one per step."
        )
    _check_steps("custom", steps, len(quintics), len(quintics))
    check_ascent(quintics)
    return Preset(quintics, start, "given by the user")


def _generate(name: str, steps: int | None, lower: float | None, margin: float) -> Preset:
    own_steps, own_lower = GENERATED[name]
    if own_steps is not None:
        _check_steps(name, steps, own_steps, own_steps)
    if not PLAIN_MARGIN <= margin <= MAX_MARGIN:
        raise ConfigError(f"margin = {margin:g} is not legal: it must be {PLAIN_MARGIN} to {MAX_MARGIN}; leave it out.")
    steps = steps if steps is not None else own_steps or 5
    lower = own_lower if lower is None else lower
    quintics = optimal_composition(steps, lower, margin)
    if not _is_legal(output_range(quintics, LARGEST_INPUT)):
        raise ConfigError(
            f'steps = {steps} is not legal: preset "{name}" cannot take [{lower:g}, 1] into [0, {LIMIT}] in so few '
            f"with a margin of {margin:g}; take more steps or a larger lower."
        )
    return Preset(quintics, "schatten8", f"generated for [{lower:g}, 1], margin {margin:g}; arXiv 2505.16932")


def _check_steps(name: str, steps: int | None, least: int, most: int) -> None:
    if steps is not None and not least <= steps <= most:
        legal = f"{least} to {most} steps" if least < most else f"{least} steps"
        raise ConfigError(
            f'steps = {steps} is not legal: preset "{name}" has {legal}; leave steps out or take preset "optimal".'
        )
