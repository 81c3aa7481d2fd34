"""What one rank did when: spans of computing, of collectives under way, and of waiting for them."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Track = Literal["compute", "waiting", "communication"]
Args = Mapping[str, str | int | float]

_POLL_SECONDS = 2e-4
# A span takes about 0.5 KB; a step of a large model has some thousands.
_MAX_SPANS = 100_000


class Span(NamedTuple):
    """Something that lasted from ``start`` to ``end`` (seconds of the timeline's clock)."""

    name: str
    track: Track
    start: float
    end: float
    args: Args


class Overlap(NamedTuple):
    """Seconds with a collective under way, and those of them in which the host did not wait, or did, for one."""

    communication_s: float
    hidden_s: float
    exposed_s: float


@dataclass(eq=False)
class Watched:
    """A collective that was under way when it was last looked at."""

    name: str
    start: float
    is_done: Callable[[], bool]
    args: dict[str, str | int | float]


class Timeline:
    """Collects spans until it is closed; safe to use from several threads.

    Args:
        now: the clock, in seconds; of a timeline attached to a ``PhaseClock`` it must be ``time.perf_counter``.
        limit: number of spans that are kept; later ones only count in ``dropped``.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, limit: int = _MAX_SPANS) -> None:
        self.now = now
        self.dropped = 0
        self._limit = limit
        self._spans: list[Span] = []
        self._watched: list[Watched] = []
        self._watcher: threading.Thread | None = None
        self._closed = False
        self._changed = threading.Condition()

    @property
    def spans(self) -> list[Span]:
        """The spans so far, in the order of their ends."""
        with self._changed:
            return list(self._spans)

    def add(self, span: Span) -> None:
        """Record a span.

        Args:
            span: what happened; ignored once the timeline is closed.
        """
        with self._changed:
            self._add(span)

    @contextlib.contextmanager
    def span(self, name: str, **args: str | int | float) -> Iterator[None]:
        """Record the block as a span of computing, also if it fails.

        Args:
            name: what the block does.
            **args: details to show with it.
        """
        start = self.now()
        try:
            yield
        finally:
            self.add(Span(name, "compute", start, self.now(), args))

    def watch(self, name: str, is_done: Callable[[], bool], **args: str | int | float) -> Watched:
        """Record a collective from now until it is done, as seen by a thread that looks every 0.2 ms.

        Args:
            name: name of the collective.
            is_done: whether it is done; called from the watching thread.
            **args: details to show with it.

        Returns:
            A handle for ``finish``.
        """
        watched = Watched(name, self.now(), is_done, args)
        with self._changed:
            if not self._closed:
                self._watched.append(watched)
                if self._watcher is None:
                    self._watcher = threading.Thread(target=self._watch, name="distmuon-timeline", daemon=True)
                    self._watcher.start()
                self._changed.notify()
        return watched

    def finish(self, watched: Watched) -> None:
        """Record that a collective is done now, unless it was seen to be done before.

        Args:
            watched: what ``watch`` returned.
        """
        with self._changed:
            if watched in self._watched:
                self._watched.remove(watched)
                self._add(Span(watched.name, "communication", watched.start, self.now(), watched.args))

    def close(self) -> None:
        """Stop recording and end the watching thread; what is under way is recorded up to now as unfinished."""
        with self._changed:
            for watched in list(self._watched):
                watched.args["unfinished"] = "yes"
                self.finish(watched)
            self._closed = True
            watcher, self._watcher = self._watcher, None
            self._changed.notify()
        if watcher is not None:
            watcher.join()

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, span: Span) -> None:
        if self._closed:
            return
        if len(self._spans) < self._limit:
            self._spans.append(span)
        else:
            self.dropped += 1

    def _watch(self) -> None:
        while self._wait_for_work():
            self._look()
            time.sleep(_POLL_SECONDS)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._watched or self._closed)
            return not self._closed

    def _look(self) -> None:
        # Neither lock nor reference is held across the pause: collectives hold the buffers of whole buckets.
        with self._changed:
            under_way = list(self._watched)
        for watched in under_way:
            try:
                done = watched.is_done()
            except Exception as error:
                # Whoever waits for the collective meets the error; here it only ends the span.
                watched.args["error"] = type(error).__name__
                done = True
            if done:
                self.finish(watched)


def overlap(events: Iterable[Span]) -> Overlap:
    """How much of the communication of one rank was hidden behind other work.

    Args:
        events: spans of one rank.

    Returns:
        Seconds, each instant counted once however many collectives are under way in it; hidden and exposed add up to
        the communication.
    """
    spans = [(span.track, span.start, span.end) for span in events if span.track != "compute"]
    communication = _covered((start, end) for track, start, end in spans if track == "communication")
    waiting = _covered((start, end) for track, start, end in spans if track == "waiting")
    either = _covered((start, end) for _, start, end in spans)
    # Sums of doubles: what is nothing may come out as 1e-17 below it.
    exposed = min(max(communication + waiting - either, 0.0), communication)
    return Overlap(communication, communication - exposed, exposed)


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
