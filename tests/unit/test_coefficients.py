"""Presets: their steps, ranges and sources, the ascent guard, and refusals."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distmuon.coefficients import (
    GRAM_MARGIN,
    LARGEST_INPUT,
    LIMIT,
    SEARCH_END,
    PresetName,
    Quintic,
    check_ascent,
    gram_margin,
    output_range,
    preset,
    valid_up_to,
)
from distmuon.errors import ConfigError
from distmuon.published import CANS, CUBIC5, PAPERS, POLAR_EXPRESS, SAFETY, YOU
from distmuon.remez import divide_input, optimal_composition

NAMES = [name for name in get_args(PresetName) if name != "custom"]
STEPS = {"opt4": 4, "opt6": 6, "papers8+2": 10}
# Emerging-Optimizers' AOL list is made for another normalization: after a Frobenius norm it flips signs.
AOL: tuple[Quintic, ...] = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)


def outputs(quintics: tuple[Quintic, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_passes_the_guard_and_names_its_source(name: PresetName) -> None:
    found = preset(name)
    assert len(found.quintics) == STEPS.get(name, 5)
    assert found.start == ("schatten8" if name.startswith("opt") else "frobenius")
    assert any(year in found.source for year in ("arXiv", "2024", "2025", "2026"))
    check_ascent(found.quintics)


# Least and largest output on [0.01, 1], the largest below 0.01, and the slope at zero.
@pytest.mark.parametrize(
    ("name", "low", "high", "slope"),
    [
        ("papers", 0.682, 1.134, 485),
        ("you", 0.978, 1.032, 493),
        ("polar_express", 0.870, 1.124, 976 / SAFETY),
        ("cans", 0.884, 1.120, 1049 / SAFETY),
        ("cubic5", 0.774, 1.300, 119 / SAFETY),
        ("papers8+2", 1.000, 1.0005, 7.9e4),
        ("opt4", 0.784, 1.217, 286),
        ("opt5", 0.986, 1.014, 606),
        ("opt6", 0.9999, 1.0001, 1271),
    ],
)
def test_ranges_and_slopes_are_the_known_ones(name: PresetName, low: float, high: float, slope: float) -> None:
    quintics = preset(name).quintics
    # A safety factor moves the input; the range is that of the list itself.
    y = outputs(quintics, np.linspace(0.01, 1.0, 200001))
    assert y.min() == pytest.approx(low, abs=1.1e-3)
    assert y.max() == pytest.approx(high, abs=1.1e-3)
    assert math.prod(a for a, _, _ in quintics) == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("papers", 1.264),
        ("you", 1.325),
        ("polar_express", 1.0109 * SAFETY),
        ("cans", 1.0000 * SAFETY),
        ("cubic5", 1.0035 * SAFETY),
        ("papers8+2", 1.264),
        ("opt5", 1.0109),
    ],
)
def test_presets_misbehave_beyond_the_known_inputs(name: PresetName, end: float) -> None:
    quintics = preset(name).quintics
    found = valid_up_to(quintics)
    assert found == pytest.approx(end, abs=1.1e-3)
    inside = outputs(quintics, np.linspace(0, found, 200001))
    assert inside.min() >= 0
    assert inside.max() <= LIMIT
    just_beyond = outputs(quintics, np.array([found + 1e-9]))[0]
    assert not 0 <= just_beyond <= LIMIT


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-4, 9), st.floats(-20, 5), st.floats(-5, 15)), min_size=1, max_size=3),
    st.floats(0.1, 1.5),
)
def test_the_exact_range_covers_every_sampled_output_tightly(quintics: list[Quintic], upper: float) -> None:
    x = np.linspace(0, upper, 20001)
    low, high = output_range(tuple(quintics), upper)
    y = outputs(tuple(quintics), x)
    room = 1e-9 * (1 + np.abs(y).max())
    assert low - room <= y.min()
    assert y.max() <= high + room
    if len(quintics) == 1:
        assert low == pytest.approx(y.min(), abs=1e-3)
        assert high == pytest.approx(y.max(), abs=1e-3)


def test_the_range_of_a_cubic_includes_its_only_extremum() -> None:
    assert output_range(((1.5, -0.5, 0.0),), 1.5) == (0.0, 1.0)
    assert output_range(((0.0, -1.0, 0.0),), 2.0) == (-8.0, 0.0)


def test_a_range_that_overflows_is_infinite() -> None:
    assert output_range(CANS * 3, 1.01) == (-math.inf, math.inf)


def test_the_search_for_illegal_inputs_ends() -> None:
    assert valid_up_to(((0.1, 0.0, 0.0),)) == SEARCH_END
    assert valid_up_to(((-1.0, 0.0, 0.0),)) < 1e-9


def test_the_guard_refuses_lists_that_ascend_or_overflow() -> None:
    with pytest.raises(ConfigError, match=r"the singular value 0\.\d+ to -1\.08.* into \[0, 1\.31\]"):
        check_ascent(AOL)
    with pytest.raises(ConfigError, match=r"the singular value 1\.010 to 6\.\d+e\+103"):
        check_ascent(CANS)
    with pytest.raises(ConfigError, match=r"the singular value 1\.010 to -1\.1"):
        check_ascent(CUBIC5)
    with pytest.raises(ConfigError, match="to nan"):
        check_ascent(((math.nan, 1.0, 1.0),))
    with pytest.raises(ConfigError, match=r"singular value 1\.010 to 1\.323"):
        check_ascent(((LIMIT, 0.0, 0.0),))


def test_the_guard_finds_an_illegal_interval_of_any_width() -> None:
    # x (1 - x^2)^2 touches 0 at x = 1; a little more or less of x^3 takes it below or keeps it above.
    with pytest.raises(ConfigError, match=r"the singular value (0\.999|1\.00\d) to -"):
        check_ascent(((1.0, -2.000001, 1.0),))
    check_ascent(((1.0, -1.999999, 1.0),))


def test_the_guard_accepts_what_ends_exactly_at_the_limit() -> None:
    slope = LIMIT / LARGEST_INPUT
    check_ascent(((math.nextafter(slope, 0), 0.0, 0.0),))


def test_only_lists_with_five_percent_of_margin_are_fit_for_gram() -> None:
    fit = {name: gram_margin(preset(name).quintics) >= GRAM_MARGIN for name in NAMES}
    assert {name for name, passes in fit.items() if passes} == {"papers", "you", "papers8+2"}
    for name in ("opt4", "opt5", "opt6", "optimal"):
        wide = preset(name, margin=GRAM_MARGIN).quintics
        assert GRAM_MARGIN <= gram_margin(wide) < GRAM_MARGIN + 0.01


def test_generated_presets_are_the_generator_s() -> None:
    assert preset("opt4").quintics == optimal_composition(4, 3e-3, 0.01)
    assert preset("opt5").quintics == optimal_composition(5, 2.5e-3, 0.01) == preset("optimal").quintics
    assert preset("opt6", margin=0.05).quintics == optimal_composition(6, 2e-3, 0.05)
    assert preset("optimal", steps=8, lower=1e-4, margin=0.02).quintics == optimal_composition(8, 1e-4, 0.02)


def test_published_presets_are_the_published_lists() -> None:
    assert preset("papers", steps=7).quintics == (PAPERS,) * 7
    assert preset("papers8+2").quintics == (PAPERS,) * 8 + ((2.0, -1.5, 0.5),) * 2
    eight = preset("polar_express", steps=8).quintics
    assert eight[:5] == preset("polar_express").quintics
    np.testing.assert_allclose(eight[0], divide_input(POLAR_EXPRESS[0], 1.01**2), rtol=1e-12)
    np.testing.assert_allclose(eight[6], divide_input(POLAR_EXPRESS[6], 1.01), rtol=1e-12)
    assert eight[7] == POLAR_EXPRESS[7]
    for name, raw in (("cans", CANS), ("cubic5", CUBIC5)):
        found = preset(name).quintics
        np.testing.assert_allclose(found[0], divide_input(raw[0], 1.01), rtol=1e-12)
        assert found[1:] == raw[1:]


@pytest.mark.parametrize(
    ("table", "sums"),
    [
        (YOU, (17.4906, -24.9840, 10.2742)),
        (CANS, (22.1753, -35.2803, 20.6965)),
        (CUBIC5, (13.1419268, -8.5085628, 0.0)),
    ],
)
def test_published_digits_add_up(table: tuple[Quintic, ...], sums: Quintic) -> None:
    np.testing.assert_allclose(np.sum(table, axis=0), sums, atol=1e-9)


def test_a_custom_list_is_taken_as_it_is() -> None:
    own: tuple[Quintic, ...] = ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    found = preset("custom", coefficients=own)
    assert (found.quintics, found.start, found.source) == (own, "frobenius", "given by the user")
    assert preset("custom", steps=2, coefficients=own, start="schatten8").start == "schatten8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "papers", "steps": 0}, 'steps = 0 is not legal: preset "papers" has 1 to 20 steps'),
        ({"name": "papers", "steps": 21}, 'steps = 21 is not legal: preset "papers" has 1 to 20 steps'),
        ({"name": "you", "steps": 4}, 'steps = 4 is not legal: preset "you" has 5 steps'),
        ({"name": "polar_express", "steps": 9}, "steps = 9 is not legal: .* has 1 to 8 steps"),
        ({"name": "papers8+2", "steps": 8}, "steps = 8 is not legal: .* has 10 steps"),
        ({"name": "opt5", "steps": 4}, 'steps = 4 is not legal: preset "opt5" has 5 steps; .* "optimal"'),
        ({"name": "opt5", "lower": 0.1}, 'lower = 0.1 is not legal with preset "opt5": only optimal can have it'),
        ({"name": "papers", "margin": 0.05}, "margin = 0.05 is not legal with .*: only opt4, opt5, opt6, optimal can"),
        ({"name": "opt5", "margin": 0.009}, "margin = 0.009 is not legal: it must be 0.01 to 0.2"),
        ({"name": "opt5", "margin": 0.3}, "margin = 0.3 is not legal: it must be 0.01 to 0.2"),
        ({"name": "optimal", "lower": 1.0}, "lower = 1 is not legal: it must be above 0 and below 1"),
        ({"name": "optimal", "steps": 0}, "steps = 0 is not legal: it must be 1 to 20"),
        ({"name": "optimal", "steps": 21}, "steps = 21 is not legal: it must be 1 to 20"),
        ({"name": "optimal", "steps": 3}, r"steps = 3 is not legal: .*\[0.0025, 1\] into \[0, 1.31\] in so few"),
        ({"name": "papers", "coefficients": AOL}, "only custom can have it"),
        ({"name": "papers", "start": "schatten8"}, "start = schatten8 is not legal .*only custom can have it"),
        ({"name": "custom"}, "needs 1 to 20 triples"),
        ({"name": "custom", "coefficients": (PAPERS,) * 21}, "needs 1 to 20 triples"),
        ({"name": "custom", "coefficients": (PAPERS,) * 3, "steps": 5}, 'steps = 5 .* preset "custom" has 3 steps'),
        ({"name": "custom", "coefficients": AOL}, "to -1.08"),
    ],
)
def test_illegal_combinations_are_refused_with_the_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset(**arguments)


def test_larger_lower_bounds_need_fewer_steps() -> None:
    assert len(preset("optimal", steps=3, lower=0.02).quintics) == 3
