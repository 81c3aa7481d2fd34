"""Phases add up until they are cleared."""

from __future__ import annotations

import time

import pytest

from distmuon.clock import PhaseClock


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock will read, one after the other."""
    times: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: times.pop(0))
    return times


def test_durations_add_up_by_phase(ticks: list[float]) -> None:
    ticks += [10.0, 11.0, 20.0, 20.5, 30.0, 34.0]
    clock = PhaseClock()
    for phase in ("gather", "apply", "gather"):
        with clock(phase):
            pass
    assert clock.seconds == {"gather": 5.0, "apply": 0.5}


def test_a_phase_that_fails_counts(ticks: list[float]) -> None:
    ticks += [1.0, 3.0]
    clock = PhaseClock()
    with pytest.raises(KeyError), clock("reduce"):
        raise KeyError
    assert clock.seconds == {"reduce": 2.0}


def test_clearing_returns_and_forgets(ticks: list[float]) -> None:
    ticks += [1.0, 3.0, 7.0, 8.0]
    clock = PhaseClock()
    with clock("reduce"):
        pass
    seconds = clock.clear()
    assert seconds == {"reduce": 2.0}
    assert clock.clear() == {}
    with clock("reduce"):
        pass
    assert seconds == {"reduce": 2.0}
    assert clock.seconds == {"reduce": 1.0}


def test_clocks_are_separate() -> None:
    first, second = PhaseClock(), PhaseClock()
    with first("reduce"):
        pass
    assert second.seconds == {}
    assert first.seconds["reduce"] >= 0
