"""The timeline of some updates of a run, in the Chrome trace format that chrome://tracing and Perfetto open.

Format: "Trace Event Format", Google, 2016: complete events "X", metadata events "M", times in microseconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from distmuon.clock import PhaseClock
from distmuon.timeline import Span, Timeline, overlap
from distmuon.train.config import RunConfig
from distmuon.train.metrics import TRACE_NAME, RankOverlap, TraceRecord

log = logging.getLogger(__name__)

_ROWS = {"compute": 0, "waiting": 1, "communication": 2}


class RankTrace(NamedTuple):
    """What one rank recorded; ``zero`` is the reading of its clock at a moment that all ranks share."""

    rank: int
    host: str
    zero: float
    dropped: int
    spans: Sequence[Span]


class Tracer:
    """Records some updates on every rank and merges them on rank 0.

    Args:
        run: the configuration.
        done: updates already done; the one after them is left out, if others follow, since it warms up.
        clock: the optimizer's clock; None if it has none.
    """

    def __init__(self, run: RunConfig, done: int, clock: PhaseClock | None) -> None:
        self.first = min(done + 2, run.schedule.updates)
        self.last = min(self.first + run.trace_steps - 1, run.schedule.updates)
        self.path = run.directory / TRACE_NAME
        self._enabled, self._clock = run.trace, clock
        self._timeline: Timeline | None = None
        self._zero = 0.0

    def span(self, name: str, **args: int) -> AbstractContextManager[None]:
        """Record a block, if its update is recorded.

        Args:
            name: what the block does.
            **args: details to show with it.
        """
        return self._timeline.span(name, **args) if self._timeline else contextlib.nullcontext()

    def begin(self, update: int) -> None:
        """Start to record if this update is the first to be recorded; every rank calls it.

        Args:
            update: number of the update about to run, from 1.
        """
        if not self._enabled or update != self.first:
            return
        self._timeline = Timeline()
        # Clocks of different machines start anywhere; ranks leave a barrier at about the same time.
        dist.barrier()
        self._zero = self._timeline.now()
        if self._clock:
            self._clock.timeline = self._timeline

    def end(self, update: int, stopping: bool) -> TraceRecord | None:
        """Write ``trace.json`` if this update is the last to be recorded; every rank calls it.

        Args:
            update: number of the update that has run.
            stopping: whether the run ends after it.

        Returns:
            What was recorded, on rank 0 after the last update; otherwise None.
        """
        timeline = self._timeline
        if timeline is None or not (stopping or update == self.last):
            return None
        self.close()
        rank = dist.get_rank()
        mine = RankTrace(rank, socket.gethostname(), self._zero, timeline.dropped, timeline.spans)
        try:
            self._part(rank).write_text(json.dumps(mine), encoding="utf-8")
        except OSError as error:
            # A run goes on without its picture.
            log.warning("rank %d cannot write its part of the timeline: %s", rank, error)
        dist.barrier()
        return self._merge(update) if rank == 0 else None

    def close(self) -> None:
        """Stop recording and end the watching thread; nothing is written."""
        if self._clock:
            self._clock.timeline = None
        if self._timeline:
            self._timeline.close()
            self._timeline = None

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".trace-rank{rank}.json")

    def _merge(self, update: int) -> TraceRecord:
        parts = [part for part in map(self._part, range(dist.get_world_size())) if part.exists()]
        if len(parts) < dist.get_world_size():
            log.warning(
                "the timeline has %d of %d ranks: the others share no folder", len(parts), dist.get_world_size()
            )
        traces = [_read(part) for part in parts]
        whole = self.path.with_name(f".{TRACE_NAME}.part")
        whole.write_text(json.dumps(chrome_trace(traces)), encoding="utf-8")
        os.replace(whole, self.path)
        for part in parts:
            part.unlink()
        ranks = [RankOverlap(**overlap(trace.spans)._asdict()) for trace in traces]
        dropped = sum(trace.dropped for trace in traces)
        return TraceRecord(first=self.first, last=update, ranks=ranks, dropped=dropped)


def chrome_trace(traces: Sequence[RankTrace]) -> dict[str, Any]:
    """Merge what the ranks recorded.

    Args:
        traces: one per rank; ranks of one host share a clock.

    Returns:
        The JSON object: ranks are processes, tracks are threads, and collectives that were under way at the same time
        lie in rows of their own.
    """
    zeros: dict[str, float] = {}
    for trace in traces:
        zeros.setdefault(trace.host, trace.zero)
    events: list[dict[str, Any]] = []
    for trace in traces:
        events += _rank_events(trace, zeros[trace.host])
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _rank_events(trace: RankTrace, zero: float) -> list[dict[str, Any]]:
    rows = {row: name for name, row in _ROWS.items()}
    events = [_metadata("process", trace.rank, 0, f"rank {trace.rank} ({trace.host})")]
    free_at: list[float] = []
    spans = []
    # Of spans that start together the longer contains the other.
    for span in sorted(trace.spans, key=lambda span: (span.start, -span.end)):
        row = _ROWS[span.track]
        if span.track == "communication":
            lane = next((lane for lane, end in enumerate(free_at) if end <= span.start), len(free_at))
            free_at[lane : lane + 1] = [span.end]
            row += lane
            rows.setdefault(row, f"communication {lane + 1}")
        spans.append(_complete(span, trace.rank, row, zero))
    events += [_metadata("thread", trace.rank, row, name) for row, name in sorted(rows.items())]
    return events + spans


def _complete(span: Span, rank: int, row: int, zero: float) -> dict[str, Any]:
    start, end = (round(1e6 * (seconds - zero), 3) for seconds in (span.start, span.end))
    return {
        "name": span.name,
        "cat": span.track,
        "ph": "X",
        "ts": start,
        "dur": round(end - start, 3),
        "pid": rank,
        "tid": row,
        "args": dict(span.args),
    }


def _metadata(what: str, rank: int, row: int, name: str) -> dict[str, Any]:
    """Name of a process or thread; by default viewers sort them by their numbers."""
    return {"name": f"{what}_name", "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}


def _read(part: Path) -> RankTrace:
    rank, host, zero, dropped, spans = json.loads(part.read_text(encoding="utf-8"))
    return RankTrace(rank, host, zero, dropped, [Span(*span) for span in spans])
