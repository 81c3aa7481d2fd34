"""Ratios and their spread on fixed numbers, and who is timed when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distmuon.benchmarks.timing import Ratio, interleave, make_clock, ratio


def test_ratios_of_fixed_times() -> None:
    # Within rounds: 2, 4, 1, 3, 5.
    assert ratio([8, 8, 4, 6, 10], [4, 2, 4, 2, 2]) == Ratio(of_best=4 / 2, median=3, low=2, high=4)
    assert ratio([3, 3], [3, 6]) == Ratio(of_best=1, median=0.75, low=0.625, high=0.875)


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2, 3], [1, 2])


def test_all_take_turns_and_every_call_gets_an_input_of_its_own() -> None:
    called: list[tuple[str, int]] = []
    calls = {name: (lambda given, name=name: called.append((name, given))) for name in "abc"}
    clock_readings = iter(range(1, 100))

    def clock(call: Callable[[], object]) -> float:
        call()
        return next(clock_readings)

    ended: list[int] = []
    seconds = interleave(calls, lambda turn: 10 * turn, 6, clock, lambda: ended.append(len(called)))
    assert [given for _, given in called] == [10 * turn for turn in range(18)]
    rounds = [[name for name, _ in called[start : start + 3]] for start in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert ended == [3, 6, 9, 12, 15, 18]
    order = [name for name, _ in called]
    for name in "abc":
        assert seconds[name] == [place + 1 for place, other in enumerate(order) if other == name]


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr("time.thread_time", lambda: next(readings))
    monkeypatch.setattr("time.perf_counter", lambda: next(readings))
    done: list[str] = []
    words, clock = make_clock(torch.device("cpu"), 1)
    assert (words, clock(lambda: done.append("one"))) == ("CPU time of the thread", 2.5)
    words, clock = make_clock(torch.device("cpu"), 2)
    assert (words, clock(lambda: done.append("two"))) == ("wall time", 0.25)
    assert done == ["one", "two"]
