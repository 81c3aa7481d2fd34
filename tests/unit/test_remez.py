"""The generator of quintics: optimality, published lists, rounding, arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distmuon.errors import ConfigError
from distmuon.published import POLAR_EXPRESS
from distmuon.remez import NARROW, TAYLOR, Quintic, best_quintic, divide_input, evaluate, optimal_composition

INTERVALS = [(1e-9, 1.0), (1e-3, 1.0), (0.024, 1.0), (0.3, 1.7), (0.9, 1.1), (0.99, 1.01)]

# What the generator must give for lower bounds 0.003, 0.0025 and 0.002, by (steps, margin in percent).
LISTS = {
    (4, 1): """8.138293 -22.718246 16.329337  3.966951 -2.837309 0.522527  3.500243 -2.570445 0.502547
        2.534638 -1.871961 0.440981""",
    (5, 1): """8.15505 -22.765023 16.362959  3.991377 -2.843176 0.521479  3.597729 -2.639854 0.51028
        2.639725 -1.922841 0.431066  1.96159 -1.343177 0.384433""",
    (6, 1): """8.171876 -22.811994 16.396721  4.016221 -2.849221 0.52046  3.702745 -2.713973 0.518546
        2.805188 -2.053635 0.445357  1.996963 -1.358843 0.371347  1.876057 -1.251174 0.375117""",
    (4, 5): """7.828263 -20.219528 13.447109  3.821229 -2.526435 0.430096  3.409323 -2.315743 0.416731
        2.626542 -1.948566 0.449446""",
    (5, 5): """7.844381 -20.261161 13.474797  3.843891 -2.531486 0.429272  3.498447 -2.374241 0.422764
        2.628834 -1.777363 0.361643  2.009922 -1.392918 0.389554""",
    (6, 5): """7.860567 -20.302966 13.502599  3.866929 -2.536684 0.428468  3.594026 -2.436469 0.429188
        2.787815 -1.891788 0.373256  1.980962 -1.263553 0.310926  1.880209 -1.255776 0.375578""",
}
LOWER = {4: 3e-3, 5: 2.5e-3, 6: 2e-3}


def outputs(quintic: Quintic, x: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b, c = quintic
    return np.asarray(a * x + b * x**3 + c * x**5)


def extrema(quintic: Quintic, lower: float, upper: float) -> NDArray[np.float64]:
    a, b, c = quintic
    inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return np.array([lower, *inner, upper])


def worst(quintics: tuple[Quintic, ...], lower: float) -> float:
    x = np.geomspace(lower, 1, 20001)
    for quintic in quintics:
        x = outputs(quintic, x)
    return float(np.abs(1 - x).max())


@pytest.mark.parametrize(("lower", "upper"), INTERVALS)
def test_the_error_equioscillates_at_four_points(lower: float, upper: float) -> None:
    quintic = best_quintic(lower, upper)
    points = extrema(quintic, lower, upper)
    assert np.all(np.diff(points) > 0)
    at_extrema = 1 - outputs(quintic, points)
    error = at_extrema[0]
    assert error > 0
    np.testing.assert_allclose(at_extrema, [error, -error, error, -error], rtol=1e-6, atol=1e-15)
    everywhere = 1 - outputs(quintic, np.linspace(lower, upper, 4001))
    assert np.abs(everywhere).max() <= error * (1 + 1e-6) + 1e-15


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-6, 0.98), st.floats(0.5, 2.0), st.tuples(*[st.floats(-1, 1)] * 3))
def test_no_other_quintic_is_closer_to_one(ratio: float, upper: float, change: tuple[float, float, float]) -> None:
    a, b, c = best_quintic(ratio * upper, upper)
    points = extrema((a, b, c), ratio * upper, upper)
    best = np.abs(1 - outputs((a, b, c), points)).max()
    other = np.abs(1 - outputs((a + change[0], b + change[1], c + change[2]), points)).max()
    # Already at these four points: de la Vallee Poussin's bound.
    assert other >= best - 1e-12


@pytest.mark.parametrize("width", [2 * NARROW, 1.01 * NARROW, 0.99 * NARROW, 1e-6, 1e-15])
def test_a_narrow_interval_gets_the_taylor_form(width: float) -> None:
    np.testing.assert_allclose(best_quintic(1 - width / 2, 1 + width / 2), TAYLOR, atol=3 * width**2 + 1e-8)


def test_scaling_the_interval_scales_the_input() -> None:
    np.testing.assert_allclose(best_quintic(0.2, 2.0), divide_input(best_quintic(0.1, 1.0), 2.0), rtol=1e-12)


def test_the_published_polar_express_table_is_reproduced() -> None:
    generated = optimal_composition(8, 1e-3, cushion=0.02407327424182761)
    np.testing.assert_allclose(generated, POLAR_EXPRESS, atol=1e-6)


@pytest.mark.parametrize(("steps", "percent"), LISTS)
def test_lists_with_a_margin_are_reproduced(steps: int, percent: int) -> None:
    expected = np.array(LISTS[steps, percent].split(), dtype=float).reshape(steps, 3)
    np.testing.assert_array_equal(optimal_composition(steps, LOWER[steps], percent / 100), expected)


def test_the_margin_leaves_the_last_quintic_alone() -> None:
    assert optimal_composition(1, 0.1, margin=0.2) == optimal_composition(1, 0.1)
    np.testing.assert_allclose(
        optimal_composition(2, 0.1, margin=0.2)[0], divide_input(optimal_composition(1, 0.1)[0], 1.2), atol=1e-6
    )


def test_coefficients_are_rounded_to_six_decimals() -> None:
    values = np.array(optimal_composition(7, 1.23e-3, 0.03))
    np.testing.assert_array_equal(values, np.round(values, 6))


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05])
def test_more_steps_are_more_exact(margin: float) -> None:
    reached = [worst(optimal_composition(steps, 2.5e-3, margin), 2.5e-3) for steps in range(1, 9)]
    assert all(later < earlier for earlier, later in zip(reached[:6], reached[1:7], strict=True))
    # Six rounded decimals per coefficient.
    assert max(reached[6:]) < 2e-6


def test_twenty_steps_reach_far_down() -> None:
    assert worst(optimal_composition(20, 1e-9, 0.01), 1e-9) < 2e-6


@pytest.mark.parametrize("lower", [0.002, 0.004])
def test_steps_after_convergence_take_the_taylor_form(lower: float) -> None:
    # From 0.002 the bound ends just above 1, from 0.004 at 1: no interval is left to fit.
    assert optimal_composition(20, lower)[-10:] == (TAYLOR,) * 10


def test_the_cushion_keeps_large_values_away_from_zero() -> None:
    x = np.linspace(0.5, 1.0, 1001)
    least = [
        min(evaluate(optimal_composition(1, 1e-6, cushion=cushion)[0], value) for value in x) for cushion in (0.0, 0.1)
    ]
    assert least[0] < 0.01
    assert least[1] > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1), "steps = 0 is not legal: it must be 1 to 20"),
        ((21, 0.1), "steps = 21 is not legal: it must be 1 to 20"),
        ((5, 0.0), "lower = 0 is not legal: it must be above 0 and below 1"),
        ((5, 1.0), "lower = 1 is not legal: it must be above 0 and below 1"),
        ((5, float("nan")), "lower = nan is not legal"),
        ((5, 0.1, -0.01), "margin = -0.01 is not legal: it must be 0 to 0.2"),
        ((5, 0.1, 0.21), "margin = 0.21 is not legal: it must be 0 to 0.2"),
        ((5, 0.1, 0.0, 1.0), "cushion = 1 is not legal: it must be at least 0 and below 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimal_composition(*arguments)


def test_the_legal_ends_are_accepted() -> None:
    assert len(optimal_composition(20, 1e-9, 0.2)) == 20
    assert len(optimal_composition(1, 0.999999, 0.0)) == 1


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, 0.5), (1.0, float("inf"))])
def test_an_interval_must_be_positive(lower: float, upper: float) -> None:
    with pytest.raises(ConfigError, match="must be 0 < lower < upper"):
        best_quintic(lower, upper)
