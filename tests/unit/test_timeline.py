"""Spans, the thread that watches collectives, and the overlap that follows from spans."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from distmuon.timeline import Overlap, Span, Timeline, Track, overlap


def fake(*times: float) -> Callable[[], float]:
    """A clock that reads these seconds, one after the other."""
    readings = iter(times)
    return lambda: next(readings)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "distmuon-timeline"]


def test_a_block_is_a_span_also_if_it_fails() -> None:
    with Timeline(fake(1.0, 2.0, 2.5, 4.0)) as timeline:
        with timeline.span("forward", micro_batch=3):
            pass
        with pytest.raises(KeyError), timeline.span("backward"):
            raise KeyError
    assert timeline.spans == [
        Span("forward", "compute", 1.0, 2.0, {"micro_batch": 3}),
        Span("backward", "compute", 2.5, 4.0, {}),
    ]
    assert watchers() == [], "nothing to watch needs no thread"


def test_memory_is_bounded() -> None:
    timeline = Timeline(limit=2)
    for number in range(5):
        timeline.add(Span("x", "compute", number, number, {}))
    assert [span.start for span in timeline.spans] == [0, 1]
    assert timeline.dropped == 3


def test_a_closed_timeline_takes_nothing_more() -> None:
    timeline = Timeline()
    timeline.close()
    timeline.close()
    timeline.add(Span("late", "compute", 0.0, 1.0, {}))
    timeline.finish(timeline.watch("late", lambda: True))
    assert (timeline.spans, timeline.dropped, watchers()) == ([], 0, [])


def test_the_watcher_sees_the_end_and_ends_itself() -> None:
    done = threading.Event()
    with Timeline() as timeline:
        before = timeline.now()
        timeline.watch("reduce_scatter", done.is_set, bytes=8)
        timeline.watch("all_reduce", lambda: True)
        assert len(watchers()) == 1
        until(lambda: len(timeline.spans) == 1)
        assert timeline.spans[0].name == "all_reduce"
        released = timeline.now()
        done.set()
        until(lambda: len(timeline.spans) == 2)
        span = timeline.spans[1]
        assert (span.name, span.track, span.args) == ("reduce_scatter", "communication", {"bytes": 8})
        assert before <= span.start < released <= span.end
    assert watchers() == []


def test_the_watcher_rests_and_wakes_up_again() -> None:
    with Timeline() as timeline:
        for number in (1, 2):
            timeline.watch("all_gather", lambda: True)
            until(lambda number=number: len(timeline.spans) == number)  # type: ignore[misc]
        assert len(watchers()) == 1


def test_who_waited_knows_the_end_first_and_it_counts_once() -> None:
    with Timeline() as timeline:
        asked = threading.Event()

        def is_done() -> bool:
            asked.set()
            return False

        watched = timeline.watch("all_gather", is_done)
        assert asked.wait(10)
        timeline.finish(watched)
        timeline.finish(watched)
        assert [span.name for span in timeline.spans] == ["all_gather"]


def test_what_is_under_way_at_the_end_is_marked() -> None:
    with Timeline() as timeline:
        timeline.watch("all_gather", lambda: False, bucket=2)
    (span,) = timeline.spans
    assert span.args == {"bucket": 2, "unfinished": "yes"}
    assert watchers() == []


def test_a_collective_that_fails_ends_its_span_and_not_the_watcher() -> None:
    def fail() -> bool:
        raise RuntimeError("connection closed by peer")

    with Timeline() as timeline:
        timeline.watch("all_reduce", fail)
        until(lambda: len(timeline.spans) == 1)
        timeline.watch("all_gather", lambda: True)
        until(lambda: len(timeline.spans) == 2)
    assert timeline.spans[0].args == {"error": "RuntimeError"}


def test_no_thread_is_left_when_the_block_fails() -> None:
    with pytest.raises(KeyError), Timeline() as timeline, timeline.span("x"):
        raise KeyError(timeline.watch("all_reduce", lambda: False).name)
    assert watchers() == []


def test_threads_do_not_lose_spans() -> None:
    timeline = Timeline(limit=1500)

    def record() -> None:
        for _ in range(500):
            with timeline.span("x"):
                timeline.finish(timeline.watch("y", lambda: False))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    timeline.close()
    assert len(timeline.spans) + timeline.dropped == 4000
    assert len(timeline.spans) == 1500


def spans(track: Track, *intervals: tuple[float, float]) -> list[Span]:
    return [Span("x", track, start, end, {}) for start, end in intervals]


@pytest.mark.parametrize(
    ("communication", "waiting", "expected"),
    [
        ([], [(0, 4)], (0, 0, 0)),
        ([(1, 5)], [], (4, 4, 0)),
        ([(1, 5)], [(0, 9)], (4, 0, 4)),
        ([(1, 5)], [(3, 9)], (4, 2, 2)),
        ([(1, 5)], [(5, 9)], (4, 4, 0)),
        # Two at a time count once; so do two waits.
        ([(1, 5), (2, 7)], [(6, 7), (6, 7)], (6, 5, 1)),
        ([(0, 1), (2, 3), (4, 5)], [(0.5, 4.5)], (3, 1, 2)),
        ([(0, 9), (1, 2)], [(3, 4), (8, 12)], (9, 7, 2)),
    ],
)
def test_overlap(
    communication: list[tuple[float, float]], waiting: list[tuple[float, float]], expected: tuple[float, ...]
) -> None:
    events = [*spans("compute", (0, 100)), *spans("waiting", *waiting), *spans("communication", *communication)]
    assert overlap(events) == Overlap(*expected)
    assert overlap(reversed(events)) == Overlap(*expected)


def test_overlap_is_never_negative() -> None:
    """Where the sums of these doubles come out 2e-16 below zero."""
    apart = [*spans("communication", (0.6, 1.4), (2.5, 2.7)), *spans("waiting", (1.6, 1.8))]
    assert overlap(apart).exposed_s == 0.0
    within = [*spans("communication", (0.8, 1.6)), *spans("waiting", (0.0, 2.4))]
    assert overlap(within).hidden_s == 0.0
