"""Where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from distmuon.timeline import Span, Timeline, Track, Watched


class Work(Protocol):
    """What a process group returns for a collective under way."""

    def is_completed(self) -> bool:
        """Whether it is done."""

    def wait(self) -> object:
        """Return when it is done."""


class Place(NamedTuple):
    """What was going on."""

    step: int
    phase: str
    bucket: int | None

    def __str__(self) -> str:
        where = "" if self.bucket is None else f", bucket {self.bucket}"
        return f'step {self.step}, phase "{self.phase}"{where}'


class PhaseClock:
    """Adds up host seconds per phase until cleared; on an accelerator that is the time to enqueue the work.

    Attributes:
        step: number of the step under way, from 0; whoever steps counts.
        phase: the innermost phase under way; outside of all, ranks only ask each other whether they agree.
        bucket: the bucket that it works on, if it is one.
        seconds: by phase.
        waited: seconds in which the host was blocked because a collective was not done.
        timeline: where phases, collectives and waits are recorded as spans; None records none.
    """

    def __init__(self) -> None:
        self.step = 0
        self.phase = "agreement"
        self.bucket: int | None = None
        self.seconds: dict[str, float] = {}
        self.waited = 0.0
        self.timeline: Timeline | None = None

    @contextlib.contextmanager
    def __call__(self, phase: str, **args: str | int | float) -> Iterator[None]:
        """Add the duration of the block to a phase.

        Args:
            phase: name of the phase.
            **args: details to show in the timeline; "bucket" is also the bucket of the phase.
        """
        outer = self.phase, self.bucket
        bucket = args.get("bucket")
        self.phase, self.bucket = phase, bucket if isinstance(bucket, int) else None
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.phase, self.bucket = outer
            self.seconds[phase] = self.seconds.get(phase, 0.0) + end - start
            self._record(phase, "compute", start, end, args)

    @property
    def place(self) -> Place:
        """What is going on now."""
        return Place(self.step, self.phase, self.bucket)

    def collective(self, name: str, *works: Work | None, **args: str | int | float) -> InFlight:
        """Take note of a collective that was just launched.

        Args:
            name: name of the collective.
            *works: what its launch returned; several count as one collective, None as done.
            **args: details to show in the timeline, e.g. bytes and bucket.

        Returns:
            A handle to wait for it with.
        """
        flight = InFlight(name, [work for work in works if work is not None], self)
        if self.timeline is not None:
            flight.watched = self.timeline, self.timeline.watch(name, flight.is_completed, **args)
        return flight

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the block as waiting for a collective.

        Args:
            name: name of the collective.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.waited += end - start
            self._record(name, "waiting", start, end, {})

    def clear(self) -> dict[str, float]:
        """Return the seconds so far and start from zero, also with the time waited."""
        seconds, self.seconds = self.seconds, {}
        self.waited = 0.0
        return seconds

    def _record(self, name: str, track: Track, start: float, end: float, args: dict[str, str | int | float]) -> None:
        if self.timeline is not None:
            self.timeline.add(Span(name, track, start, end, args))


class InFlight:
    """A collective under way; made by ``PhaseClock.collective``.

    Args:
        name: name of the collective.
        works: the works that it consists of.
        clock: what the waiting is counted by.
    """

    def __init__(self, name: str, works: list[Work], clock: PhaseClock) -> None:
        self.watched: tuple[Timeline, Watched] | None = None
        self._name, self._works, self._clock = name, works, clock

    def is_completed(self) -> bool:
        """Whether waiting would return at once."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Wait until it is done.

        Raises:
            RuntimeError: the collective failed.
        """
        with self._clock.waiting(self._name):
            for work in self._works:
                work.wait()
        # On an accelerator, wait only orders streams: the collective may still be under way.
        if self.watched is not None and self.is_completed():
            timeline, watched = self.watched
            timeline.finish(watched)
