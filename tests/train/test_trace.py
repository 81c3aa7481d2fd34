"""Which updates are recorded, and what the file says to a trace viewer."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distmuon.clock import PhaseClock
from distmuon.config import parse
from distmuon.timeline import Span, Track
from distmuon.train.config import RunConfig
from distmuon.train.metrics import TraceRecord
from distmuon.train.trace import RankTrace, Tracer, chrome_trace

Events = list[dict[str, Any]]


def span(name: str, track: Track, start: float, end: float, **args: int) -> Span:
    return Span(name, track, start, end, args)


def events_of(*traces: RankTrace) -> Events:
    events = json.loads(json.dumps(chrome_trace(traces)))["traceEvents"]
    assert isinstance(events, list)
    return events


def check(events: Events) -> None:
    """What viewers require: names for every row in use, and spans of a row that nest or follow each other."""
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert event["ph"] == "M"
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert rows.keys() <= named
    assert {pid for pid, _ in rows} == {event["pid"] for event in events if event["name"] == "process_name"}
    for intervals in rows.values():
        for start, end in intervals:
            # Rounded to nanoseconds, a span may end that much after the one around it.
            cut = [other for other in intervals if start + 0.01 < other[0] < end - 0.01 and other[1] > end + 0.01]
            assert not cut


def test_ranks_of_one_host_share_a_clock() -> None:
    first = RankTrace(0, "a", 100.0, 0, [span("forward", "compute", 100.5, 101.0, micro_batch=1)])
    second = RankTrace(1, "a", 100.25, 0, [span("forward", "compute", 100.5, 100.75)])
    events = events_of(first, second)
    check(events)
    one, two = (event for event in events if event["ph"] == "X")
    common = {"name": "forward", "cat": "compute", "ph": "X", "tid": 0}
    assert one == {**common, "pid": 0, "ts": 500_000.0, "dur": 500_000.0, "args": {"micro_batch": 1}}
    assert two == {**common, "pid": 1, "ts": 500_000.0, "dur": 250_000.0, "args": {}}
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "rank 0 (a)", 1: "rank 1 (a)"}


def test_hosts_are_aligned_where_their_first_ranks_met() -> None:
    starts = [
        event["ts"]
        for event in events_of(
            *[
                RankTrace(rank, host, zero, 0, [span("x", "compute", zero + 1.0, zero + 2.0)])
                for rank, host, zero in ((0, "a", 100.0), (1, "b", 7.0), (2, "b", 7.5))
            ]
        )
        if event["ph"] == "X"
    ]
    assert starts == [1e6, 1e6, 1.5e6]


def test_collectives_at_the_same_time_lie_in_rows_of_their_own() -> None:
    intervals = [(0.0, 2.0), (1.0, 3.0), (1.5, 4.0), (2.0, 5.0), (3.5, 6.0), (9.0, 9.5)]
    spans = [span("reduce_scatter", "communication", *interval) for interval in reversed(intervals)]
    spans += [span("reduce_scatter", "waiting", 1.0, 2.0), span("step", "compute", 0.0, 9.0)]
    events = events_of(RankTrace(0, "a", 0.0, 0, spans))
    check(events)
    rows = {(event["ts"] / 1e6, event["tid"]) for event in events if event["ph"] == "X" and event["tid"] > 1}
    assert rows == {(0.0, 2), (1.0, 3), (1.5, 4), (2.0, 2), (3.5, 3), (9.0, 2)}
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    others = {3: "communication 2", 4: "communication 3"}
    assert names == {0: "compute", 1: "waiting", 2: "communication", **others}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Two ranks, the other of which has already written its part."""
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    (tmp_path / "run").mkdir()
    other = RankTrace(1, "b", 0.0, 4, [span("all_reduce", "communication", 1.0, 3.0)])
    (tmp_path / "run" / ".trace-rank1.json").write_text(json.dumps(other))
    table = {"out": str(tmp_path), "trace": True, "trace_steps": 2, "schedule": {"updates": 9}}
    return parse(RunConfig, table, "test")


def record(tracer: Tracer, clock: PhaseClock, first: int, stop: int) -> dict[int, TraceRecord | None]:
    ends = {}
    for update in range(first, stop + 1):
        tracer.begin(update)
        with tracer.span("update", update=update), clock("apply"):
            pass
        ends[update] = tracer.end(update, stopping=update == stop)
    return ends


def recorded(run: RunConfig) -> list[int]:
    events = json.loads((run.directory / "trace.json").read_text())["traceEvents"]
    check(events)
    return [event["args"]["update"] for event in events if event["name"] == "update"]


@pytest.mark.parametrize(
    ("done", "stop", "updates"),
    [(0, 9, [2, 3]), (4, 9, [6, 7]), (0, 2, [2]), (7, 9, [9]), (8, 9, [9])],
)
def test_the_updates_after_the_first(run: RunConfig, done: int, stop: int, updates: list[int]) -> None:
    clock = PhaseClock()
    ends = record(Tracer(run, done, clock), clock, done + 1, stop)
    written = ends.pop(updates[-1])
    assert set(ends.values()) <= {None}
    assert written is not None
    assert (written.first, written.last, written.dropped) == (updates[0], updates[-1], 4)
    assert [rank.model_dump() for rank in written.ranks] == [
        {"communication_s": 0.0, "hidden_s": 0.0, "exposed_s": 0.0},
        {"communication_s": 2.0, "hidden_s": 2.0, "exposed_s": 0.0},
    ]
    assert recorded(run) == updates
    assert [path.name for path in run.directory.iterdir()] == ["trace.json"]
    assert clock.timeline is None


def test_nothing_is_recorded_unless_asked_for(run: RunConfig) -> None:
    clock = PhaseClock()
    ends = record(Tracer(run.model_copy(update={"trace": False}), 0, clock), clock, 1, 9)
    assert set(ends.values()) == {None}
    assert not (run.directory / "trace.json").exists()


def test_a_failure_leaves_neither_thread_nor_file(run: RunConfig) -> None:
    clock = PhaseClock()
    tracer = Tracer(run, 0, clock)
    tracer.begin(2)
    assert clock.timeline is not None
    clock.timeline.watch("all_gather", lambda: False)
    tracer.close()
    assert clock.timeline is None
    assert not [thread for thread in threading.enumerate() if thread.name == "distmuon-timeline"]
    assert not (run.directory / "trace.json").exists()
    assert tracer.end(2, stopping=True) is None


def test_an_optimizer_without_a_clock_has_a_timeline_too(run: RunConfig) -> None:
    assert record(Tracer(run, 0, None), PhaseClock(), 1, 3)[3] is not None
    assert recorded(run) == [2, 3]
