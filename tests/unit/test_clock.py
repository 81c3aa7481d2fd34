"""Phases add up until they are cleared."""

from __future__ import annotations

import threading
import time

import pytest

from distmuon.clock import PhaseClock
from distmuon.timeline import Span, Timeline


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


class FakeWork:
    """A collective whose wait takes a reading of the clock."""

    def __init__(self, completes: bool = True, fails: bool = False) -> None:
        self.completes, self.fails = completes, fails
        self.waited = False

    def is_completed(self) -> bool:
        return self.waited and self.completes

    def wait(self) -> None:
        self.waited = True
        if self.fails:
            raise RuntimeError("connection closed by peer")


def test_waiting_is_counted_and_cleared(ticks: list[float]) -> None:
    ticks += [1.0, 3.0, 10.0, 10.5]
    clock = PhaseClock()
    works = [FakeWork(), FakeWork()]
    flight = clock.collective("reduce", works[0], None, works[1], bytes=8)
    assert not flight.is_completed()
    flight.wait()
    assert flight.is_completed()
    assert all(work.waited for work in works)
    clock.collective("broadcast", FakeWork()).wait()
    assert clock.waited == 2.5
    assert clock.clear() == {}
    assert clock.waited == 0.0


def test_a_collective_without_work_is_done() -> None:
    flight = PhaseClock().collective("all_gather", None)
    assert flight.is_completed()
    flight.wait()


def test_phases_and_collectives_are_spans_of_an_attached_timeline(ticks: list[float]) -> None:
    ticks += [1.0, 2.0, 3.0, 5.0]
    clock = PhaseClock()
    readings = iter([0.5, 6.0])
    with Timeline(lambda: next(readings)) as timeline:
        clock.timeline = timeline
        flight = clock.collective("all_gather", FakeWork(), bytes=8, bucket=1)
        with clock("apply", bucket=0):
            pass
        flight.wait()
    assert sorted(timeline.spans, key=lambda span: span.start) == [
        Span("all_gather", "communication", 0.5, 6.0, {"bytes": 8, "bucket": 1}),
        Span("apply", "compute", 1.0, 2.0, {"bucket": 0}),
        Span("all_gather", "waiting", 3.0, 5.0, {}),
    ]
    assert clock.seconds == {"apply": 1.0}


def test_a_collective_that_goes_on_after_wait_is_still_watched() -> None:
    """As on an accelerator, where wait only orders streams."""
    clock = PhaseClock()
    work = FakeWork(completes=False)
    with Timeline() as timeline:
        clock.timeline = timeline
        clock.collective("all_gather", work).wait()
        assert [span.track for span in timeline.spans] == ["waiting"]
        work.completes = True
        while len(timeline.spans) < 2:
            time.sleep(1e-3)
    assert timeline.spans[1].args == {}


def test_a_wait_that_fails_counts() -> None:
    clock = PhaseClock()
    with Timeline() as timeline:
        clock.timeline = timeline
        with pytest.raises(RuntimeError, match="closed by peer"):
            clock.collective("all_gather", FakeWork(fails=True)).wait()
    assert {span.track for span in timeline.spans} == {"waiting", "communication"}
    assert clock.waited > 0


def test_without_a_timeline_no_thread_is_started() -> None:
    before = threading.active_count()
    flight = PhaseClock().collective("all_gather", FakeWork())
    assert threading.active_count() == before
    assert flight.watched is None
