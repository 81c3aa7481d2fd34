"""Dealing matrices to ranks, beside plain twins that try every rank for every matrix."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmuon import placement
from distmuon.placement import Dealt, Run, Sizes, equal
from tests.unit.test_placement import HYPOTHESIS

# Few lengths and costs, so that ties are common; costs are whole numbers, which add up without rounding.
lengths = st.sampled_from([1, 2, 2, 3, 5, 8])
costs = st.sampled_from([0.0, 0.0, 1.0, 2.0, 4.0])
runs = st.lists(st.tuples(lengths, costs), max_size=12).map(
    lambda pairs: [Run(number, 0, length, cost) for number, (length, cost) in enumerate(pairs)]
)
loads = st.lists(st.sampled_from([0.0, 0.0, 1.0, 3.0]), min_size=1, max_size=5)


def deal(runs: list[Run], loads: list[float], size: Any, choice: Any) -> Dealt:
    """Largest first, each to the best rank with room; what fits nowhere stays, smallest first, before the rest."""
    cap = equal(runs, len(loads))[0]
    whole: list[list[Run]] = [[] for _ in loads]
    left, now = [], list(loads)
    for run in sorted((run for run in runs if run.cost), key=size):
        used = [sum(other.length for other in shard) for shard in whole]
        open_to = [rank for rank in range(len(loads)) if used[rank] + run.length <= cap]
        if open_to:
            rank = min(open_to, key=lambda rank: choice(used[rank], now[rank], rank))
            whole[rank].append(run)
            now[rank] += run.cost
        else:
            left.append(run)
    return Dealt(whole, left[::-1] + [run for run in runs if not run.cost], now)


@HYPOTHESIS
@given(runs, loads)
def test_costly_ones_go_to_the_least_loaded(runs: list[Run], loads: list[float]) -> None:
    expected = deal(runs, loads, lambda run: -run.cost, lambda used, load, rank: (load, used, rank))
    assert placement._longest_first(runs, loads) == expected


@HYPOTHESIS
@given(runs, loads)
def test_long_ones_go_where_they_fill_most(runs: list[Run], loads: list[float]) -> None:
    expected = deal(runs, loads, lambda run: -run.length, lambda used, load, rank: (-used, load, rank))
    assert placement._best_fit(runs, loads) == expected


@HYPOTHESIS
@given(runs, loads)
def test_length_decides_only_where_cost_left_a_matrix_over(runs: list[Run], loads: list[float]) -> None:
    by_cost, by_length = placement._longest_first(runs, loads), placement._best_fit(runs, loads)
    assert placement._deal(runs, loads) == (by_cost if by_cost.level or not by_length.level else by_length)


@HYPOTHESIS
@given(st.lists(runs, max_size=3), st.integers(1, 5))
def test_shards_may_be_level_only_with_places_for_the_longest(batches: list[list[Run]], world: int) -> None:
    sizes = Sizes()
    for batch in batches:
        sizes.add(batch)
    everything = [run for batch in batches for run in batch]
    cap = equal(everything, world)[0]
    matrices = [run.length for run in everything if run.cost]
    # A shard has cap // n places for matrices of at least n elements.
    room = [sum(length >= n for length in matrices) <= world * (cap // n) for n in set(matrices)]
    assert sizes.may_level(world) is all(room)


@pytest.mark.parametrize(("numel", "world", "each"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (12, 4, 3)])
def test_equal_shards_hold_everything(numel: int, world: int, each: int) -> None:
    assert equal([Run(0, 0, numel, 0.0)] if numel else [], world) == [each] * world
